"""What transformers' users hand over, as our own nouns: messages, and images of many kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_packing.document import Document, DocumentError, Image, Part, Text
from mllm.models.pictures import pixels_of, read_image

_FIELDS = ("image", "path", "url", "base64")
_SHOWN = 80  # characters of what was asked for, in a message


def is_batch(conversation: Any) -> bool:
    """Return whether it is a list of conversations, not one."""
    return bool(conversation) and not isinstance(conversation[0], Mapping)


def plain(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as chat templates know them: `image_url` as an image, no key that is None."""
    turns = []
    for message in messages:
        turn = {name: value for name, value in message.items() if value is not None}
        if not isinstance(turn.get("content", ""), str):
            turn["content"] = [_with_image(part) for part in turn["content"]]
        turns.append(turn)
    return turns


def document_of(messages: Iterable[Mapping[str, Any]]) -> Document:
    """Return a conversation's messages as a document.

    Args:
        messages: `role` and `content`; the content is a text, or a list of parts as transformers'
            processors take it: `{"type": "text", "text": …}` and `{"type": "image", …}` with the
            image under `image`, `path`, `url` or `base64`.

    Raises:
        ValueError: a part of another kind, or an image that is missing or cannot be read.
    """
    turns = [(message["role"], _parts(message.get("content", ""))) for message in messages]
    return Document.conversation(turns)


def image_of(value: Any) -> Image:
    """Return an image from whatever people hand over; see `pictures`.

    Args:
        value: a path, an address or base64, the bytes of a file, a Pillow image, an array, a
            tensor, or our own.

    Raises:
        ValueError: nothing that can be read as an image.
    """
    if isinstance(value, Image):
        return value
    if isinstance(value, str | Path | bytes):
        data = read_image(value)
        try:
            return Image.from_bytes(data)
        except DocumentError as error:
            name = "bytes" if isinstance(value, bytes) else str(value)[:_SHOWN]
            raise ValueError(f"image {name}: {error}") from error
    pixels = pixels_of(value)
    height, width, _ = pixels.shape
    return Image.from_bytes(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes())


def all_images(images: Any) -> list[Image]:
    """Return one image, a list, an array of four axes or lists of them as one list.

    Raises:
        ValueError: as `image_of`.
    """
    if getattr(images, "ndim", 0) == 4:
        images = list(images)
    if isinstance(images, list | tuple):
        return [image for several in images for image in all_images(several)]
    return [image_of(images)]


def images_per_text(images: Any, counts: Sequence[int]) -> list[list[Image]]:
    """Deal images to texts, which hold so many placeholders each.

    Args:
        images: None, one, a list, an array of four axes, or a list of lists, one for each text.

    Raises:
        ValueError: more or fewer images than placeholders.
    """
    if isinstance(images, list | tuple) and images and isinstance(images[0], list | tuple):
        nested = [all_images(row) for row in images]
        if [*map(len, nested)] != [*counts]:
            raise ValueError(
                f"the texts hold {[*counts]} images, but {[*map(len, nested)]} are given"
            )
        return nested
    given = [] if images is None else all_images(images)
    if len(given) != sum(counts):
        raise ValueError(f"the texts hold {sum(counts)} images, but {len(given)} are given")
    flat = iter(given)
    return [[next(flat) for _ in range(count)] for count in counts]


def _parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)]
    parts: list[Part] = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            parts.append(Text(part["text"]))
        elif kind == "image":
            given = [name for name in _FIELDS if part.get(name) is not None]
            if not given:
                raise ValueError(f"an image of a message has none of {', '.join(_FIELDS)}")
            parts.append(image_of(part[given[0]]))
        else:
            raise ValueError(f"a part of a message is text or image, not {kind!r}")
    return parts


def _with_image(part: Any) -> Any:
    """A part of a message, with OpenAI's spelling of an image turned into transformers'."""
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return part
    given = part.get("image_url")
    return {"type": "image", "url": given.get("url") if isinstance(given, Mapping) else given}
