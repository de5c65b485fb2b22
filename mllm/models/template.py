"""THE rule by which a document becomes token ids, and which of them are learned.

Raw document: the begin token if the tokenizer adds one, every text tokenised on its own, images in
their places, the end token. Captions and pages are written this way.

Conversation: the tokenizer's own chat template renders the whole conversation, which is tokenised
once. An answer is what the template adds between the conversation before it (with the generation
prompt) and the conversation after it; it is learned up to and with its end-of-turn token. A default
system prompt stays where the template puts one, and is not learned. Nothing is found by searching
strings. So an answer that begins the conversation is read as the template writes it, and refused
where it is to be learned: no prompt leads to it.

Text that contains a special token's string is refused: it would end a turn or fake an image.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from data_packing.document import Document, DocumentError, Image, Text
from data_packing.sample import Cost
from mllm.models.rendering import Renderer
from mllm.models.turns import turns_of

VERSION = 2
"""Part of the fingerprint: counts cached under another version of the rule are not used."""


_EXCHANGE = Document.conversation([("user", "Hello"), ("assistant", "Hello")])


class ImageText(NamedTuple):
    """What stands for an image in text.

    Attributes:
        asked: what the chat template writes for a part `{"type": "image"}`.
        written: what is tokenised in its place, and in a raw document; it holds the image token
            once.
        before_begin: whether images that open a raw document stand before its begin token, as
            BLIP-2 has them.
    """

    asked: str
    written: str
    before_begin: bool = False


@dataclass(slots=True)
class Written:
    """A document as token ids, with one placeholder per image.

    Attributes:
        ids: int64 [L].
        learned: bool [L]; False at images.
    """

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]


class Template:
    """The rule for one tokenizer.

    Args:
        tokenizer: a fast tokenizer that has `image_token` as a special token.
        image_token: the placeholder of one visual token.
        image_text: what stands for an image; left out, the image token alone.

    Raises:
        ValueError: the tokenizer lacks the placeholder or an end token, or the text of an image
            does not hold it once.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str,
        image_text: ImageText | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.image_text = image_text or ImageText(image_token, image_token)
        if self.image_text.written.count(image_token) != 1:
            raise ValueError(
                f"the text of an image, {self.image_text.written!r}, must hold {image_token!r} once"
            )
        self.renderer = Renderer(tokenizer, self.image_text.asked, self.image_text.written)
        if image_token not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no token {image_token!r}")
        self.image_id: int = tokenizer.get_vocab()[image_token]
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token), which ends a document")
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {number for number, token in added if token.special}
        self._special_ids |= set(tokenizer.all_special_ids)
        strings = {token.content for _, token in added if token.special}
        strings |= set(tokenizer.all_special_tokens)
        self._specials = strings
        longest_first = sorted(strings, key=lambda text: (-len(text), text))
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        probe = tokenizer("a")["input_ids"]
        begins = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
        self._begin = [tokenizer.bos_token_id] if begins else []
        self._overheads: dict[str, int] = {}
        self._image_ids = self._tokens([self.image_text.written])[0]
        if self._image_ids.count(self.image_id) != 1:
            raise ValueError(f"{image_token!r} is no special token of the tokenizer")

    def write(self, document: Document) -> Written:
        """Return the ids of a document and which are learned.

        Raises:
            DocumentError: nothing in it, a special token in a text, an answer learned in part, a
                learned answer before any question, or a conversation that the chat template
                refuses.
            ValueError: a conversation, and the tokenizer has no chat template.
        """
        self._check(document)
        if document.is_conversation:
            return self._write_conversation(document)
        return self._write_raw(document)

    def prompt(self, document: Document) -> NDArray[np.int64]:
        """Return the ids up to where the model goes on.

        A conversation gets the template's generation prompt after its last turn, which must not be
        the assistant's; a raw document is left open, without the end token.

        Raises:
            as `write`; DocumentError also if the last turn is the assistant's, or nothing is said.
        """
        ids = self._prompt(document)
        if not len(ids):
            raise DocumentError("there is nothing to go on from: the prompt has no tokens")
        return ids

    def _prompt(self, document: Document) -> NDArray[np.int64]:
        self._check(document)
        if not document.is_conversation:
            return self._write_raw(document).ids[:-1]
        messages = turns_of(document)
        if messages[-1].role == "assistant":
            raise DocumentError("a prompt ends with the user's turn, this one with an answer")
        text = self.renderer.render(messages, generation_prompt=True)
        return np.array(self._tokens([text])[0], dtype=np.int64)

    def cost(self, document: Document) -> Cost:
        """Return the text tokens of the document, by piece.

        The cost of a slice is the overhead and the sum of its pieces (and of their images), which
        is exactly the length of `write` of that slice.

        Raises:
            as `write`.
        """
        self._check(document)
        pieces = document.pieces()
        images = _images_of_pieces(document, pieces)
        if not document.is_conversation:
            sizes = [sum(token != self.image_id for token in ids) for ids in self._texts(document)]
            counts = [sum(sizes[start:stop]) for start, stop in pieces]
            overhead = len(self._begin) + 1
        else:
            counts, overhead = self._conversation_counts(document, pieces)
        return Cost(overhead, tuple(zip(counts, images, strict=True)))

    def tokenize(
        self, texts: Sequence[str], add_special_tokens: bool | None = None
    ) -> list[NDArray[np.int64]]:
        """Return the ids of texts in which what the chat template writes stands for an image.

        Args:
            texts: as rendered, or raw.
            add_special_tokens: put the begin token before a text that has none; left out, where
                the text is raw: the chat template writes some special token beside images.
        """
        image, rows = self.image_text, []
        written = [text.replace(image.asked, image.written) for text in texts]
        for text, ids in zip(texts, self._tokens(written), strict=True):
            begins = add_special_tokens
            if begins is None:
                begins = not any(token in text for token in self._own_tokens)
            at = self._begin_at(ids)
            begin = self._begin if begins and ids[at : at + 1] != self._begin else []
            rows.append(np.array([*ids[:at], *begin, *ids[at:]], dtype=np.int64))
        return rows

    @cached_property
    def _own_tokens(self) -> list[str]:
        """The special tokens that no image is made of: who writes one wrote the whole text."""
        return sorted(self._specials.difference(self.image_marks))

    @cached_property
    def image_marks(self) -> list[str]:
        """The special tokens of which what stands for an image is made, sorted."""
        shown = "".join((self.image_text.asked, self.image_text.written))
        return sorted(token for token in self._specials if token in shown)

    def ids_of(self, text: str) -> list[int]:
        """Return the ids of a text as it is."""
        return self._tokens([text])[0]

    def special_token(self, text: str) -> str | None:
        """Return the first special token's string in a text, None where there is none."""
        found = self._special.search(text)
        return found.group() if found else None

    def is_special(self, token: int) -> bool:
        """Whether an id is a special token's: the template writes it, no text may."""
        return token in self._special_ids

    # -- raw documents ---------------------------------------------------------------------------

    def _write_raw(self, document: Document) -> Written:
        ids: list[int] = []
        learned: list[bool] = []
        last = True
        for part, text in zip(document.parts, self._texts(document), strict=True):
            ids.extend(text)
            if isinstance(part, Image):
                learned.extend([False] * len(text))
            else:
                learned.extend([part.learned] * len(text))
                last = part.learned
        begin = self._begin_at(ids)
        ids[begin:begin], learned[begin:begin] = self._begin, [False] * len(self._begin)
        ids.append(self.tokenizer.eos_token_id)
        learned.append(last)
        return Written(np.array(ids, dtype=np.int64), np.array(learned, dtype=bool))

    def _begin_at(self, ids: list[int]) -> int:
        """Where the begin token goes: at the front, or after the images there."""
        at, image = 0, self._image_ids
        while self.image_text.before_begin and ids[at : at + len(image)] == image:
            at += len(image)
        return at

    def _texts(self, document: Document) -> list[list[int]]:
        """Ids of every part of a raw document."""
        image = self.image_text.written
        return self._tokens([image if isinstance(p, Image) else p.text for p in document.parts])

    def end_of_turn(self) -> int | None:
        """Return the special token that answers end with, None where the chat template has none."""
        try:
            written = self._write_conversation(_EXCHANGE)
        except ValueError:  # no chat template, or one that asks for more than a question
            return None
        learned: list[int] = written.ids[written.learned].tolist()
        return learned[-1] if len(learned) > 1 and learned[-1] in self._special_ids else None

    # -- conversations ---------------------------------------------------------------------------

    def _write_conversation(self, document: Document) -> Written:
        messages = turns_of(document)
        if messages[-1].role == "system" and len(messages) == 1:
            raise DocumentError("a conversation of nothing but a system prompt")
        text = self.renderer.render(messages)
        bounds: list[int] = []
        answers: dict[int, bool] = {}
        for number, message in enumerate(messages):
            if message.role == "assistant":
                if number == 0 and message.learned == {True}:
                    raise DocumentError(
                        "the conversation begins with an answer, and nothing asks for it: begin "
                        'with a turn of the user, or mark the answer "loss": false'
                    )
                start = (
                    self.renderer.prefix(text, messages[:number], generation_prompt=True)
                    if number
                    else 0
                )
                stop = self.renderer.prefix(text, messages[: number + 1])
                bounds += [start, stop]
                answers[start] = message.learned == {True}
        ids: list[int] = []
        learned: list[bool] = []
        for start, segment in self._segments(text, bounds):
            ids += segment
            turn_end = self._turn_end(segment) if answers.get(start) else 0
            learned += [at < turn_end for at in range(len(segment))]
        result = Written(np.array(ids, dtype=np.int64), np.array(learned, dtype=bool))
        self._unlearn_images(result)
        self._check_placeholders(document, result.ids)
        return result

    def _conversation_counts(
        self, document: Document, pieces: list[tuple[int, int]]
    ) -> tuple[list[int], int]:
        """Tokens of every piece, and what every slice pays besides."""
        whole = self._write_conversation(document).ids
        total = int((whole != self.image_id).sum())
        if len(pieces) == 1:
            return [total], 0
        messages = turns_of(document)
        text = self.renderer.render(messages)
        number_of = {message.first_part: number for number, message in enumerate(messages)}
        bounds = [
            self.renderer.prefix(text, messages[: number_of[start]]) for start, _ in pieces[1:]
        ]
        counts = [
            sum(token != self.image_id for token in segment)
            for _, segment in self._segments(text, bounds)
        ]
        overhead = self._overhead(document, counts[1])
        if not 0 <= overhead <= counts[0]:
            raise DocumentError("the chat template changes a turn when the turns before it are cut")
        counts[0] -= overhead
        return counts, overhead

    def _overhead(self, document: Document, second_piece: int) -> int:
        """What a slice pays besides its pieces: the second piece alone minus it in the middle."""
        leading = document.parts[: document.system_parts]
        system = "\n".join(part.text for part in leading if isinstance(part, Text))
        if system not in self._overheads:
            alone = self._write_conversation(document.select(1, 2)).ids
            self._overheads[system] = int((alone != self.image_id).sum()) - second_piece
        return self._overheads[system]

    def _segments(self, text: str, bounds: list[int]) -> list[tuple[int, list[int]]]:
        """(start, ids) of the stretches between the bounds; together they are the whole's ids.

        Raises:
            DocumentError: a token reaches over a bound.
        """
        cuts = sorted({0, *bounds, len(text)})
        spans = list(itertools.pairwise(cuts))
        whole, *parts = self._tokens([text, *(text[start:stop] for start, stop in spans)])
        if [token for part in parts for token in part] != whole:
            parts = self._cut_by_prefixes(text, whole, spans)
        return [(start, part) for (start, _), part in zip(spans, parts, strict=True)]

    def _cut_by_prefixes(
        self, text: str, whole: list[int], spans: list[tuple[int, int]]
    ) -> list[list[int]]:
        """Cut ids where prefixes end: for tokenizers that write the first word differently."""
        prefixes = self._tokens([text[:stop] for _, stop in spans])
        ends = [len(prefix) for prefix in prefixes]
        for prefix in prefixes:
            if whole[: len(prefix)] != prefix:
                raise DocumentError(
                    "an answer begins or ends inside a token of the chat template: it starts or "
                    "ends with white space or a part of a word that merges with the template"
                )
        return [whole[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]

    def _turn_end(self, answer: list[int]) -> int:
        """How many tokens of an answer are learned: up to its last special token, if it has one."""
        ends = [
            at
            for at, token in enumerate(answer)
            if token in self._special_ids and token != self.image_id
        ]
        return ends[-1] + 1 if ends else len(answer)

    # -- shared ----------------------------------------------------------------------------------

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _check(self, document: Document) -> None:
        if not document.parts:
            raise DocumentError("an empty document")
        for part in document.parts:
            if isinstance(part, Image):
                if part.role == "system":
                    raise DocumentError("an image in the system prompt")
            elif part.box is None and (found := self.special_token(part.text)):
                raise DocumentError(f"a text contains the special token {found!r}")

    def _unlearn_images(self, written: Written) -> None:
        """What stands for an image is nothing to produce, in an answer either."""
        at = self._image_ids.index(self.image_id)
        for place in np.flatnonzero(written.ids == self.image_id):
            around = slice(max(0, place - at), place - at + len(self._image_ids))
            if written.ids[around].tolist() != self._image_ids:  # its text merged with the turn's
                around = slice(place, place + 1)
            written.learned[around] = False

    def _check_placeholders(self, document: Document, ids: NDArray[np.int64]) -> None:
        found, wanted = int((ids == self.image_id).sum()), len(document.images)
        if found != wanted:
            raise DocumentError(
                f"the chat template wrote {found} of {wanted} images: it drops or repeats turns"
            )


def _images_of_pieces(document: Document, pieces: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Indices into `document.images` of every piece's images."""
    numbers: list[tuple[int, ...]] = []
    seen = 0
    for start, stop in pieces:
        count = sum(isinstance(part, Image) for part in document.parts[start:stop])
        numbers.append(tuple(range(seen, seen + count)))
        seen += count
    return numbers
