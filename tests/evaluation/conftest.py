"""Held-out examples and a scorer whose likelihoods one can work out by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image as Pillow

from data_packing.captions import normalised
from data_packing.document import Document, Image, Text
from mllm.evaluation.heldout import HeldOut

COLOURS = ("red", "green", "blue", "gold", "navy", "teal", "pink", "gray", "tan", "lime")


def square(colour: str, side: int = 12) -> Image:
    """A PNG of one colour."""
    file = io.BytesIO()
    Pillow.new("RGB", (side, side), colour).save(file, "PNG")
    return Image.from_bytes(file.getvalue())


def held(count: int = 10, categories: Sequence[str] = ()) -> list[HeldOut]:
    """Squares whose caption is their colour; every second one may have a category."""
    examples = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        category = categories[number % len(categories)] if categories else None
        image = square(colour, 12 + number // len(COLOURS))
        examples.append(HeldOut(f"s{number}", "squares", image, f"A {colour} square.", category))
    return examples


class Seeing:
    """Prices a text at 1 nat per word if it is true of its image, at `wrong` nats if not."""

    def __init__(self, examples: Sequence[HeldOut], wrong: float = 3.0) -> None:
        self.true: dict[bytes, set[str]] = {}
        for example in examples:
            facts = self.true.setdefault(example.image.data, set())
            facts.add(normalised(example.caption))
            facts.add(normalised(example.category or "-"))
        self.wrong = wrong
        self.calls = 0

    def __call__(self, documents: Sequence[Document]) -> list[tuple[float, int]]:
        self.calls += len(documents)
        prices = []
        for document in documents:
            text = next(p.text for p in document.parts if isinstance(p, Text) and p.learned)
            words = len(text.split()) + 1
            known = self.true.get(document.images[0].data, set())
            each = 1.0 if normalised(text) in known else self.wrong
            prices.append((each * words, words))
        return prices


def blind(documents: Sequence[Document]) -> list[tuple[float, int]]:
    """Finds every token equally likely, whatever the image."""
    prices = []
    for document in documents:
        text = next(p.text for p in document.parts if isinstance(p, Text) and p.learned)
        prices.append((2.0 * len(text), len(text)))
    return prices


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A prepared data folder with ten squares of two categories."""
    import hashlib

    folder = tmp_path / "data"
    (folder / "heldout" / "images").mkdir(parents=True)
    records = []
    for example in held(10, ("Warm", "Cold")):
        (folder / "heldout" / "images" / f"{example.key}.png").write_bytes(example.image.data)
        records.append(
            {
                "key": example.key,
                "source": example.source,
                "image": f"images/{example.key}.png",
                "caption": example.caption,
                "category": example.category,
            }
        )
    text = "the cat sat on a red chair while a small dog looked at the picture " * 4
    (folder / "heldout" / "captions.json").write_text(json.dumps(records))
    questions = {"name": ["What is this?"], "category": ["Which category is it?"]}
    (folder / "heldout" / "questions.json").write_text(
        json.dumps({"questions": questions, "categories": ["Warm", "Cold", "Tepid"]})
    )
    (folder / "heldout" / "text.txt").write_text(text)
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "heldout_text": {
                    "name": "A cat",
                    "file": "heldout/text.txt",
                    "sha256": hashlib.sha256(text.encode()).hexdigest(),
                },
                "sources": [{"package": "squares", "licence": "CC0 <b>", "attribution": "us"}],
            }
        )
    )
    return folder
