"""What a person wrote: text and images in order, with roles. The first of the four nouns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from data_packing.images import MAX_PIXELS, DocumentError, size

Role = Literal["system", "user", "assistant"]
Box = tuple[float, float, float, float]

__all__ = ["Box", "Document", "DocumentError", "Image", "Part", "Role", "Text"]


@dataclass(frozen=True, slots=True)
class Text:
    """A stretch of text.

    Attributes:
        text: the words as written.
        role: who says it in a conversation; None in a raw document.
        learned: whether the model learns to produce it.
        variants: (name, other words for the same place), such as a translation; kept in the order
            of the names, so that equal texts are equal.
        box: (left, top, right, bottom) of a region of the last image before, as fractions of its
            width and height. The processor writes it, as numbers or as a feature; `text` is empty.

    Raises:
        DocumentError: two variants of one name, or one without a name; a box that is none.
    """

    text: str
    role: Role | None = None
    learned: bool = True
    variants: tuple[tuple[str, str], ...] = ()
    box: Box | None = None

    def __post_init__(self) -> None:
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise DocumentError(
                    f"a box is left, top, right, bottom as fractions of the image, got {self.box}"
                )
        if not self.variants:
            return
        names = [name for name, _ in self.variants]
        if "" in names:
            raise DocumentError("a variant of a text has no name")
        if len(set(names)) < len(names):
            raise DocumentError(f"two variants of a text have one name: {_quoted(sorted(names))}")
        object.__setattr__(self, "variants", tuple(sorted(self.variants)))


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded image file.

    Attributes:
        data: the bytes of the file (PNG, JPEG, …), not decoded.
        height, width: pixels as a person sees them, after EXIF rotation.
        role: who shows it in a conversation; None in a raw document.
        clip: of which clip of the document it is a frame, from 1 on; 0: it is a picture.
    """

    data: bytes
    height: int
    width: int
    role: Role | None = None
    clip: int = 0

    @classmethod
    def from_bytes(
        cls, data: bytes, role: Role | None = None, max_pixels: int = MAX_PIXELS
    ) -> Image:
        """Make an image from the bytes of its file; only the header is read.

        Raises:
            DocumentError: empty, not a known format, or more than `max_pixels`.
        """
        height, width = size(data, max_pixels)
        return cls(data, height, width, role)

    @classmethod
    def open(
        cls, path: str | Path, role: Role | None = None, max_pixels: int = MAX_PIXELS
    ) -> Image:
        """Read an image file.

        Raises:
            DocumentError: the file is missing or unreadable, or as `from_bytes`.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DocumentError(f"image {path}: {error.strerror or error}") from error
        try:
            return cls.from_bytes(data, role, max_pixels)
        except DocumentError as error:
            raise DocumentError(f"image {path}: {error}") from error


Part = Text | Image


@dataclass(frozen=True, slots=True)
class Document:
    """Parts in order, and where they came from.

    Either no part has a role (a raw document: caption, page) or every part has one (a
    conversation).

    Attributes:
        parts: text and images, in reading order.
        source: the name of the data set.
        key: the document's name inside its source; with `source` it is unique.

    Raises:
        DocumentError: some parts have a role and some have none, or a role is unknown.
    """

    parts: tuple[Part, ...]
    source: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        roles = {part.role for part in self.parts}
        if None in roles and len(roles) > 1:
            raise DocumentError(
                "some parts have a role and some have none: give every part a role, or none"
            )
        for role in roles - {None, *get_args(Role)}:
            raise DocumentError(f"unknown role {role!r}; known: {', '.join(get_args(Role))}")
        if self._continues(0):
            raise DocumentError("a box stands before the first image: there is nothing it is of")

    @classmethod
    def caption(cls, image: Image, text: str, source: str = "", key: str = "") -> Document:
        """An image followed by its caption, which is learned."""
        return cls((replace(image, role=None), Text(text)), source, key)

    @classmethod
    def conversation(
        cls,
        turns: Iterable[tuple[Role, str | Sequence[Part | str]]],
        source: str = "",
        key: str = "",
    ) -> Document:
        """A conversation from (role, content) turns; content is text or text and images in order.

        What the assistant says is learned, what the system and the user say is not.
        """
        parts: list[Part] = []
        for role, content in turns:
            for part in [content] if isinstance(content, str) else content:
                if isinstance(part, Image):
                    parts.append(replace(part, role=role))
                else:
                    text = Text(part) if isinstance(part, str) else part
                    parts.append(replace(text, role=role, learned=role == "assistant"))
        return cls(tuple(parts), source, key)

    @property
    def images(self) -> tuple[Image, ...]:
        """The images in order."""
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def is_conversation(self) -> bool:
        """Whether the parts have roles."""
        return any(part.role is not None for part in self.parts)

    @property
    def system_parts(self) -> int:
        """How many leading parts are the system's; they belong to every slice."""
        for number, part in enumerate(self.parts):
            if part.role != "system":
                return number
        return len(self.parts)

    def with_variant(self, name: str) -> Document:
        """Return the document with one variant in the place of every text that has variants.

        A text without variants stays.

        Raises:
            DocumentError: no text has the variant, or one has others and not this one.
        """
        texts = [part for part in self.parts if isinstance(part, Text)]
        known = sorted({own for text in texts for own, _ in text.variants})
        if name not in known:
            raise DocumentError(f"no text variant {name!r}; it has {_quoted(known) or 'none'}")
        for number, text in enumerate(texts, start=1):
            own = [each for each, _ in text.variants]
            if own and name not in own:
                raise DocumentError(f"text {number} has no variant {name!r}; it has {_quoted(own)}")
        parts = tuple(
            replace(part, text=dict(part.variants)[name], variants=())
            if isinstance(part, Text) and part.variants
            else part
            for part in self.parts
        )
        return replace(self, parts=parts)

    def pieces(self) -> list[tuple[int, int]]:
        """Return the ranges of parts [start, stop) that must stay together.

        A document that does not fit is cut between pieces, nowhere else. Raw document: a piece
        starts before an image that follows text, and between two texts; never between an image and
        the text right after it. Conversation: a piece starts at a user turn that brings its own
        image, or at any user turn when the document has no image at all. A box stays with the
        image that it is of. Leading system parts are
        in no piece: `select` adds them to every slice.
        """
        first = self.system_parts
        any_turn = not self.images
        starts = [
            at
            for at in range(first, len(self.parts))
            if at == first or self._may_start(at, any_turn)
        ]
        stops = [*starts[1:], len(self.parts)] if starts else []
        return list(zip(starts, stops, strict=True))

    def select(self, start_piece: int, stop_piece: int) -> Document:
        """Return the slice of pieces [start_piece, stop_piece), with the leading system parts.

        Raises:
            IndexError: the range is empty or outside the document.
        """
        pieces = self.pieces()
        if not 0 <= start_piece < stop_piece <= len(pieces):
            raise IndexError(
                f"pieces [{start_piece}, {stop_piece}) of a document that has {len(pieces)}"
            )
        start, stop = pieces[start_piece][0], pieces[stop_piece - 1][1]
        return replace(self, parts=self.parts[: self.system_parts] + self.parts[start:stop])

    def _continues(self, at: int) -> bool:
        """Whether a box from this part on is of an image before it."""
        for part in self.parts[at:]:
            if isinstance(part, Image):
                return False
            if part.box is not None:
                return True
        return False

    def _may_start(self, at: int, any_turn: bool) -> bool:
        part, before = self.parts[at], self.parts[at - 1]
        if self._continues(at):
            return False
        if part.role is None:
            return isinstance(before, Text)
        if part.role != "user" or before.role == "user":
            return False
        return any_turn or self._turn_has_image(at)

    def _turn_has_image(self, at: int) -> bool:
        for part in self.parts[at:]:
            if part.role != "user":
                return False
            if isinstance(part, Image):
                return True
        return False


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
