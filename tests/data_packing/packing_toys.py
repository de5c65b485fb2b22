"""A model-free processor and small documents, for the tests of data_packing."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from data_packing.corpus import Corpus
from data_packing.document import Document, Image, Text
from data_packing.images import decode_all
from data_packing.index import Index, build_index
from data_packing.ledger import Refusal
from data_packing.plan import Plan
from data_packing.planned import PlannedStep
from data_packing.sample import Cost, ImageSlot, Sample
from data_packing.sharding import write_shards

IMAGE_TOKENS = 4
IMAGE_PATCHES = 16
SIDE = 4


def png(height: int = 8, width: int = 9, seed: int = 0) -> bytes:
    """A small PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encoded(PillowImage.fromarray(pixels), "PNG")


def encoded(image: PillowImage.Image, kind: str, **options: object) -> bytes:
    """The bytes of a Pillow image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image(height: int = 8, width: int = 9, seed: int = 0) -> Image:
    return Image.from_bytes(png(height, width, seed))


def image_cost(height: int, width: int) -> tuple[int, int]:
    return IMAGE_TOKENS, IMAGE_PATCHES


def cost(document: Document) -> Cost:
    """One token per character, and one at the end."""
    pieces, seen = [], 0
    for start, stop in document.pieces():
        parts = document.parts[start:stop]
        images = sum(isinstance(part, Image) for part in parts)
        text = sum(len(part.text) for part in parts if isinstance(part, Text))
        pieces.append((text, tuple(range(seen, seen + images))))
        seen += images
    system = document.parts[: document.system_parts]
    return Cost(1 + sum(len(p.text) for p in system if isinstance(p, Text)), tuple(pieces))


def encode(document: Document) -> Sample:
    """What `cost` promises; pixels are cut to SIDE x SIDE."""
    ids: list[int] = []
    slots = []
    for part in document.parts:
        if isinstance(part, Image):
            slots.append(ImageSlot(len(ids), IMAGE_TOKENS, (2, 2)))
            ids.extend([1] * IMAGE_TOKENS)
        else:
            ids.extend(2 + ord(letter) for letter in part.text)
    tokens = np.array([*ids, 0], dtype=np.int64)
    pixels = [picture[:SIDE, :SIDE] for picture in decode_all(document.images)]
    return Sample(tokens, tokens.copy(), slots, pixels, {}, document.source, document.key)


def captions(count: int, longest: int = 60, start: int = 0) -> Iterator[Document]:
    random = np.random.default_rng(start)
    for number in range(start, start + count):
        text = "x" * int(random.integers(1, longest))
        yield Document.caption(image(seed=number % 7), text, "toys", f"k{number}")


def page(pieces: list[int], key: str = "page", images: bool = False) -> Document:
    """A raw document with one piece per number: text of that length, after an image if asked."""
    parts: list[Text | Image] = []
    for length in pieces:
        parts += [image(), Text("y" * length)] if images else [Text("y" * length)]
    return Document(tuple(parts), "toys", key)


def index_of(documents: object, folder: Path, name: str = "toys", per_shard: int = 100) -> Index:
    report = write_shards(documents, folder, name, per_shard)  # type: ignore[arg-type]
    return build_index(report.paths, cost, "toy processor")


def dealt_order(dealt: Sequence[Sequence[Any]]) -> list[Any]:
    """What was dealt to ranks, in the order before: forth over the ranks, back, and so on."""
    turns = [[own[turn] for own in dealt] for turn in range(len(dealt[0]))]
    rows = [row[::-1] if turn % 2 else row for turn, row in enumerate(turns)]
    return [item for row in rows for item in row if item is not None]


def two_sources(folder: Path) -> list[Index]:
    """Captions, and pages of which some are cut and two are refused."""
    pages = [page([20] * (number % 9 + 1), f"page{number}", True) for number in range(40)]
    pages.append(page([500], "too long"))
    bad = Refusal("raw", "bad", "broken image")
    return [
        index_of(captions(200), folder, "captions"),
        index_of([*pages, bad], folder, "pages"),
    ]


def plan_of(data: Corpus | Sequence[Index], **changes: Any) -> Plan:
    """A plan of one epoch with packs of 128 tokens, four of them a step."""
    settings: dict[str, Any] = {
        "processor_fingerprint": "p",
        "image_cost": image_cost,
        "tokens": 128,
        "patches": 64,
        "tokens_per_step": 512,
        "seed": 0,
        "epochs": 1,
    }
    sources = len(data.resident if isinstance(data, Corpus) else data)
    weights = changes.pop("weights", [1.0] * sources)
    return Plan(data, weights, **(settings | changes))


def uses(steps: Sequence[PlannedStep]) -> Counter[tuple[int, int, int]]:
    """How often each piece of each document is in a pack: (source, document, piece)."""
    return Counter(
        (entry.source, entry.document, piece)
        for step in steps
        for pack in step.packs
        for entry in pack.entries
        for piece in range(entry.start_piece, entry.stop_piece)
    )
