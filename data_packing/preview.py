"""What the model will see: packs of a plan read, encoded and spelled, for a page that shows them.

Nothing here knows the model: `encode` and `spell` are handed in. See preview_page.py for the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from data_packing.account import summary
from data_packing.document import Document, DocumentError
from data_packing.encoding import Encode, encode_entry
from data_packing.index import Index
from data_packing.ledger import Ledger, Refusal
from data_packing.plan import Plan
from data_packing.planned import Entry, PlannedPack
from data_packing.sample import IGNORED, Sample

THUMBNAIL = 128
"""Pixels; the longer side of an image on the page, which shows it at half of that."""


class Token(NamedTuple):
    """A token as text; `special` where the template wrote it. Text is empty inside a character."""

    text: str
    special: bool = False


Spell = Callable[[Sequence[int]], list[Token]]
"""Token ids -> as many tokens."""


@dataclass(frozen=True, slots=True)
class ShownImage:
    """An image as the encoder sees it.

    Attributes:
        start, length: its tokens in the document.
        grid: (rows, columns) of them.
        height, width: of the file, in pixels.
        pictures: a data URL for each of its views.
    """

    start: int
    length: int
    grid: tuple[int, int]
    height: int
    width: int
    pictures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShownDocument:
    """A document, or the slice of one that is in the pack.

    Attributes:
        slice: which pieces of it, empty when all.
        tokens: of its L positions; an image's are there too.
        learned: bool [L].
    """

    source: str
    key: str
    slice: str
    tokens: list[Token]
    learned: NDArray[np.bool_]
    images: list[ShownImage]


@dataclass(frozen=True, slots=True)
class ShownPack:
    """A pack; `step` is counted from 1, as in metrics.jsonl."""

    number: int
    step: int
    patches: int
    documents: list[ShownDocument]
    refused: list[Refusal]

    @property
    def tokens(self) -> int:
        """How many tokens are in it."""
        return sum(len(document.tokens) for document in self.documents)

    @property
    def learned(self) -> int:
        """How many of them are learned."""
        return sum(int(document.learned.sum()) for document in self.documents)


@dataclass(slots=True)
class Preview:
    """What the page shows.

    Attributes:
        title: of the page.
        facts: those of `account.summary`.
        ledger: what becomes of every document of the run.
        capacity: tokens that a pack holds.
        packs: those shown, in order.
    """

    title: str
    facts: dict[str, Any]
    ledger: Ledger
    capacity: int
    packs: list[ShownPack] = field(default_factory=list)


def look(
    plan: Plan,
    encode: Encode,
    spell: Spell,
    *,
    title: str,
    packs: int = 16,
    step: int = 1,
) -> Preview:
    """Read some packs of a plan.

    Args:
        plan: of the run.
        encode: from a document to a sample, as the loader has it.
        spell: from token ids to text.
        title: of the page.
        packs: how many to show.
        step: the first step to show, from 1.

    Raises:
        ValueError: the run has no such step.
    """
    if not 1 <= step <= plan.total_steps:
        raise ValueError(f"step {step}: the run has steps 1 to {plan.total_steps:,}")
    facts, found = summary(plan)
    preview = Preview(title, facts, found.ledger, plan.tokens)
    for number, planned in _packs(plan, step, packs):
        shown = _show(planned, number, encode, spell, plan.across_documents)
        preview.packs.append(shown)
    return preview


def _packs(plan: Plan, step: int, most: int) -> Iterator[tuple[int, PlannedPack]]:
    """The first packs from a step on, each with its step."""
    seen = 0
    for planned in plan.steps(plan.cursor(step - 1)):
        for pack in planned.packs[: most - seen]:
            yield planned.number + 1, pack
        seen += len(planned.packs)
        if seen >= most:
            return


def _show(
    planned: PlannedPack,
    step: int,
    encode: Encode,
    spell: Spell,
    across_documents: bool,
) -> ShownPack:
    documents: list[ShownDocument] = []
    refused = []
    for entry in planned.entries:
        index = planned.indexes[entry.source]
        try:
            document, sample = encode_entry(index.read(entry.document), entry, encode)
        except DocumentError as error:
            first = None if entry.whole else entry.start_piece
            refused.append(Refusal(index.name, index.key(entry.document), str(error), first))
            continue
        starts = not documents or not across_documents
        documents.append(_document(index, entry, document, sample, spell, starts))
    return ShownPack(planned.number, step, planned.patches, documents, refused)


def _document(
    index: Index, entry: Entry, document: Document, sample: Sample, spell: Spell, starts: bool
) -> ShownDocument:
    """One document; the first token of a segment is not learned, as `collate` has it."""
    learned = sample.labels != IGNORED
    if starts:
        learned[:1] = False
    tokens = spell(sample.input_ids.tolist())
    assert len(tokens) == len(learned), (document.key, len(tokens), len(learned))
    assert len(sample.pixels) == sum(slot.views for slot in sample.slots), document.key
    views = map(picture, sample.pixels)
    shown = [
        document.images[number if slot.image is None else slot.image]
        for number, slot in enumerate(sample.slots)
    ]
    slots = zip(sample.slots, shown, strict=True)
    return ShownDocument(
        source=index.name,
        key=index.key(entry.document),
        slice="" if entry.whole else _slice(index, entry),
        tokens=tokens,
        learned=learned,
        images=[
            ShownImage(
                slot.start,
                slot.length,
                slot.grid,
                image.height,
                image.width,
                tuple(islice(views, slot.views)),
            )
            for slot, image in slots
        ],
    )


def _slice(index: Index, entry: Entry) -> str:
    pieces = int(index.piece_start[entry.document + 1] - index.piece_start[entry.document])
    if entry.stop_piece == entry.start_piece + 1:
        return f"piece {entry.stop_piece} of {pieces}"
    return f"pieces {entry.start_piece + 1} to {entry.stop_piece} of {pieces}"


def picture(pixels: NDArray[np.uint8]) -> str:
    """Pixels uint8 [H, W, 3] as a small JPEG in a data URL."""
    image = PillowImage.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
