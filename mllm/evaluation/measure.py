"""All figures of one model on a prepared data folder, and the bars they are held against."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_packing.document import Document
from mllm.evaluation.heldout import HeldOut, read_heldout
from mllm.evaluation.likelihood import (
    Figure,
    Scorer,
    bootstrap,
    caption_gap,
    category_choice,
    choice,
)
from mllm.evaluation.scoring import score, text_loss
from mllm.models.errors import read_json

__all__ = ["BARS", "Bar", "HeldOutData", "Unmeasured", "measure"]

CANDIDATES = 8
TRIALS = 500
TEXT_TOKENS = 4096
Advance = Callable[[str, int, int], None]
"""Called with (figure, documents done, documents in all)."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must reach in the quick start.

    Attributes:
        title: the figure's name for people.
        unit: of its value.
        limit: the bar.
        least: whether the value must be at least the limit (else at most).
        meaning: one or two sentences on what is measured.
    """

    title: str
    unit: str
    limit: float
    least: bool
    meaning: str

    def met(self, value: float) -> bool:
        """Whether a value reaches the bar."""
        return value >= self.limit if self.least else value <= self.limit


BARS: dict[str, Bar] = {
    "caption_gap": Bar(
        "Caption loss gap",
        "nats/token",
        1.0,
        True,
        "How much likelier a caption gets, per token, beside its own image than beside the image "
        "of another caption. A model that ignores its images has a gap of 0.",
    ),
    "choice": Bar(
        f"Caption choice among {CANDIDATES}",
        "%",
        0.38,
        True,
        f"How often an image's own caption is the likeliest per token among {CANDIDATES} captions "
        "of the held-out set. Guessing gives 1 in 8.",
    ),
    "category": Bar(
        "Furniture category, image against blank",
        "points",
        0.30,
        True,
        "How much oftener the true catalogue category is the likeliest answer with the image than "
        "with a white square in its place: what the image adds to the prior of the answers.",
    ),
    "text": Bar(
        "Plain text, change of loss",
        "nats/token",
        0.15,
        False,
        "How much worse the language model got at plain English by learning to see, against the "
        "language model it started from, on the same text.",
    ),
}


@dataclass(slots=True)
class Unmeasured:
    """A figure that this data or model cannot give.

    Attributes:
        reason: why, for people.
    """

    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.reason}


@dataclass(slots=True)
class HeldOutData:
    """What is held out in a data folder.

    Attributes:
        examples: images with captions.
        questions: ways to ask, by what is asked; the first is the one to evaluate with.
        categories: all furniture categories, also those that no held-out example has.
        text, text_name, text_sha256: the plain text, where it is from, its checksum.
        sources: packages of the data, with their licences, as the manifest lists them.
    """

    examples: list[HeldOut]
    questions: dict[str, list[str]]
    categories: list[str]
    text: str
    text_name: str
    text_sha256: str
    sources: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> HeldOutData:
        """Read `heldout/` and `manifest.json` of a data folder.

        Raises:
            ValueError: a file is missing or damaged, or the text is not the one of the manifest.
        """
        folder = Path(folder)
        examples = read_heldout(folder / "heldout" / "captions.json")
        asked = read_json(folder / "heldout" / "questions.json")
        manifest = read_json(folder / "manifest.json")
        named = manifest.get("heldout_text", {})
        path = folder / str(named.get("file", "heldout/text.txt"))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; prepare the data again") from error
        digest = hashlib.sha256(data).hexdigest()
        if named.get("sha256", digest) != digest:
            raise ValueError(
                f"{path}: its checksum is {digest}, the manifest says {named['sha256']}; "
                "prepare the data again"
            )
        return cls(
            examples,
            asked.get("questions", {}),
            asked.get("categories", []),
            data.decode("utf-8"),
            str(named.get("name", path.name)),
            digest,
            manifest.get("sources", []),
        )


def measure(
    model: Any,
    processor: Any,
    data: HeldOutData,
    original: Callable[[], tuple[Any, Any]] | None,
    seed: int = 0,
    trials: int = TRIALS,
    advance: Advance | None = None,
    only: Sequence[str] = tuple(BARS),
) -> dict[str, Figure | Unmeasured]:
    """Measure a model.

    Args:
        model, processor: as `mllm.inference.generate.load` gives them.
        data: what is held out.
        original: loads the language model before training and its tokenizer; None: not known.
        seed: of the shuffled images, the drawn captions and the resampling.
        trials: least number of caption choices.
        advance: told how far a figure is.
        only: names of the figures wanted, keys of `BARS`.

    Returns:
        By name; a figure that the data cannot give is there with its reason.
    """

    def price(name: str) -> Scorer:
        seen, total = 0, 0

        def step(count: int) -> None:
            nonlocal seen
            seen += count
            if advance:
                advance(name, seen, total)

        def scorer(documents: Sequence[Document]) -> list[tuple[float, int]]:
            nonlocal total
            total += len(documents)
            return score(model, processor, documents, progress=step)

        return scorer

    def category() -> Figure:
        if not data.questions.get("category"):
            raise ValueError("the data has no category question")
        question = data.questions["category"][0]
        return category_choice(
            price("category"), data.examples, question, data.categories, seed=seed
        )

    def text() -> Figure:
        if original is None:
            raise ValueError("the original language model is not known")
        if advance:
            advance("text", 0, 2)
        return _text(model, processor, data, original, seed, advance)

    tasks: dict[str, Callable[[], Figure]] = {
        "caption_gap": lambda: caption_gap(price("caption_gap"), data.examples, seed),
        "choice": lambda: choice(price("choice"), data.examples, CANDIDATES, trials, seed),
        "category": category,
        "text": text,
    }
    results: dict[str, Figure | Unmeasured] = {}
    for name in only:
        try:
            results[name] = tasks[name]()
        except ValueError as error:
            results[name] = Unmeasured(str(error))
    return results


def _text(
    model: Any,
    processor: Any,
    data: HeldOutData,
    original: Callable[[], tuple[Any, Any]],
    seed: int,
    advance: Advance | None,
) -> Figure:
    """Loss on the text after training minus before, paired window by window."""
    after, mine = text_loss(
        model.language_model, processor.tokenizer, data.text, max_tokens=TEXT_TOKENS
    )
    if advance:
        advance("text", 1, 2)
    before, theirs = text_loss(*original(), data.text, max_tokens=TEXT_TOKENS)
    if advance:
        advance("text", 2, 2)
    tokens = [n for _, n in mine]
    if tokens != [n for _, n in theirs]:
        raise ValueError("the original language model has another tokenizer")
    worse = [a - b for (a, _), (b, _) in zip(mine, theirs, strict=True)]
    low, high = bootstrap(worse, tokens, [[i] for i in range(len(tokens))], seed)
    parts = {
        "before": before,
        "after": after,
        "name": data.text_name,
        "sha256": data.text_sha256,
    }
    return Figure(after - before, low, high, sum(tokens), chance=None, parts=parts)
