"""Held-out images beside what the model says of them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image as Pillow

from data_packing.document import Document
from data_packing.images import decode
from mllm.evaluation.heldout import HeldOut
from mllm.evaluation.measure import HeldOutData
from mllm.inference.generate import Generator

__all__ = ["Asked", "Shown", "ask", "pick", "thumbnail"]

BATCH = 8
LONGEST_ANSWER = 24


@dataclass(slots=True)
class Asked:
    """A question, what the model said, and what is true."""

    question: str
    truth: str
    answer: str = ""


@dataclass(slots=True)
class Shown:
    """One held-out image with its questions."""

    key: str
    source: str
    image: str
    asked: list[Asked] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything but the picture."""
        return {name: value for name, value in asdict(self).items() if name != "image"}


def pick(examples: Sequence[HeldOut], count: int, seed: int) -> list[HeldOut]:
    """Draw examples, as many from every source as there are, in the order of the file."""
    random = np.random.default_rng(seed)
    sources: dict[str, list[int]] = {}
    for number in random.permutation(len(examples)).tolist():
        sources.setdefault(examples[number].source, []).append(number)
    chosen: list[int] = []
    while len(chosen) < min(count, len(examples)):
        for name in sorted(sources):
            if sources[name] and len(chosen) < count:
                chosen.append(sources[name].pop())
    return [examples[number] for number in sorted(chosen)]


def ask(
    generator: Generator,
    data: HeldOutData,
    count: int = 16,
    seed: int = 0,
    advance: Callable[[int, int], None] | None = None,
) -> list[Shown]:
    """Ask what held-out images show and, of furniture, in which category it is.

    Args:
        generator: the model.
        data: what is held out, with the questions' wording.
        count: images.
        advance: told (answers so far, answers in all).
    """
    shown: list[Shown] = []
    questions: list[tuple[Asked, Document]] = []
    name = next(iter(data.questions.get("name", [])), "What is this?")
    category = next(iter(data.questions.get("category", [])), None)
    for example in pick(data.examples, count, seed):
        rows = [Asked(name, example.caption)]
        if example.category and category:
            rows.append(Asked(category, example.category))
        shown.append(Shown(example.key, example.source, thumbnail(example.image.data), rows))
        for row in rows:
            turn = Document.conversation([("user", [example.image, row.question])])
            questions.append((row, turn))
    for start in range(0, len(questions), BATCH):
        some = questions[start : start + BATCH]
        for (row, _), answer in zip(
            some, generator.answers([turn for _, turn in some], LONGEST_ANSWER), strict=True
        ):
            row.answer = answer
        if advance:
            advance(start + len(some), len(questions))
    return shown


def thumbnail(data: bytes, side: int = 320) -> str:
    """A small copy of an image as a data URI."""
    image = Pillow.fromarray(decode(data))
    image.thumbnail((side, side))
    file = BytesIO()
    image.save(file, "WEBP", quality=80, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
