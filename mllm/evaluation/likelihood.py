"""Figures read off likelihoods: how much a model uses its image, and what it still knows of text.

Every figure is a function of a scorer and of examples. A scorer maps documents to
(negative log-likelihood in nats, number of learned tokens); `mllm.evaluation.scoring.scorer`
makes one from a model, and anything else that can price a document may take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_packing.captions import normalised
from data_packing.document import Document, Image
from mllm.evaluation.heldout import HeldOut, blank_image, by_caption

__all__ = [
    "Figure",
    "Scorer",
    "bootstrap",
    "caption_gap",
    "category_choice",
    "choice",
    "derangement",
]

Scorer = Callable[[Sequence[Document]], list[tuple[float, int]]]
RESAMPLES = 2000


@dataclass(slots=True)
class Figure:
    """A measured number with its 95 % interval.

    Attributes:
        value: the figure; its unit is part of its name in the report.
        low, high: bootstrap interval over captions.
        chance: what guessing gives, where that means something.
        trials: how many trials (choices) or tokens (losses) stand behind it.
        parts: the numbers it is made of.
    """

    value: float
    low: float
    high: float
    trials: int
    chance: float | None = None
    parts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap(
    tops: Sequence[float],
    bottoms: Sequence[float],
    groups: Sequence[Sequence[int]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """95 % percentile interval of sum(tops) / sum(bottoms), resampling whole groups.

    A group (all trials of one caption) is drawn or left out as one, because its trials are not
    independent. Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.

    Raises:
        ValueError: there is nothing to resample.
    """
    if not groups:
        raise ValueError("no examples to take an interval over")
    top = np.array([sum(tops[i] for i in group) for group in groups], np.float64)
    bottom = np.array([sum(bottoms[i] for i in group) for group in groups], np.float64)
    draws = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
    totals = bottom[draws].sum(1)
    ratios = top[draws].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def derangement(labels: Sequence[str], seed: int = 0) -> list[int]:
    """A seeded permutation p in which labels[p[i]] never equals labels[i].

    Positions are laid out label by label in random order and the row is turned by the size of the
    largest label group: no position can then land in its own group.

    Raises:
        ValueError: one label holds more than half of the positions, so none exists.
    """
    random = np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for position in random.permutation(len(labels)).tolist():
        groups.setdefault(labels[position], []).append(position)
    largest = max((len(group) for group in groups.values()), default=0)
    if 2 * largest > len(labels):
        raise ValueError(
            f"cannot shuffle {len(labels)} examples: {largest} of them share one caption"
        )
    row = [position for group in groups.values() for position in group]
    result = [0] * len(labels)
    for place, position in enumerate(row):
        result[position] = row[(place + largest) % len(row)]
    return result


def caption_gap(scorer: Scorer, examples: Sequence[HeldOut], seed: int = 0) -> Figure:
    """Nats per token by which a caption gets less likely beside another caption's image.

    value = loss(shuffled image) - loss(right image), each the sum of the NLL over all caption
    tokens divided by their number. Parts: both losses, and the same per source.

    Raises:
        ValueError: no examples, or all of one caption.
    """
    _some(examples)
    other = derangement([normalised(example.caption) for example in examples], seed)
    right = scorer([Document.caption(e.image, e.caption) for e in examples])
    wrong = scorer(
        [
            Document.caption(examples[at].image, example.caption)
            for at, example in zip(other, examples, strict=True)
        ]
    )
    tokens = [n for _, n in right]
    assert tokens == [n for _, n in wrong], "the image changed the number of caption tokens"
    gains = [b - a for (a, _), (b, _) in zip(right, wrong, strict=True)]
    low, high = bootstrap(gains, tokens, by_caption(examples), seed)
    total = sum(tokens)
    sources: dict[str, dict[str, float]] = {}
    for name in sorted({example.source for example in examples}):
        rows = [i for i, example in enumerate(examples) if example.source == name]
        count = sum(tokens[i] for i in rows)
        sources[name] = {
            "gap": sum(gains[i] for i in rows) / count,
            "right": sum(right[i][0] for i in rows) / count,
            "images": len(rows),
        }
    parts = {
        "right": sum(nll for nll, _ in right) / total,
        "shuffled": sum(nll for nll, _ in wrong) / total,
        "images": len(examples),
        "sources": sources,
    }
    return Figure(sum(gains) / total, low, high, total, chance=0.0, parts=parts)


def choice(
    scorer: Scorer,
    examples: Sequence[HeldOut],
    candidates: int = 8,
    trials: int = 500,
    seed: int = 0,
) -> Figure:
    """How often the image's own caption wins among `candidates` by mean token likelihood.

    Every image takes part equally often, at least `trials` times in all; the other captions of a
    trial are distinct and drawn from the whole held-out set. A tie counts as its share.

    Raises:
        ValueError: fewer distinct captions than candidates.
    """
    _some(examples)
    texts = {normalised(example.caption): example.caption for example in examples}
    if len(texts) < candidates:
        raise ValueError(f"{candidates} candidates asked for, {len(texts)} distinct captions held")
    random = np.random.default_rng(seed)
    names = list(texts)
    rounds = -(-trials // len(examples))
    asked: list[tuple[int, list[str]]] = []
    for number, example in enumerate(examples):
        own = normalised(example.caption)
        others = [name for name in names if name != own]
        for _ in range(rounds):
            drawn = random.choice(len(others), candidates - 1, replace=False)
            asked.append((number, [own, *(others[i] for i in drawn)]))
    # Sorted by image, each pair once: a scorer can then reuse what it computed for the image.
    pairs = list(dict.fromkeys((number, name) for number, row in asked for name in row))
    scores = scorer([Document.caption(examples[i].image, texts[name]) for i, name in pairs])
    mean = {pair: nll / n for pair, (nll, n) in zip(pairs, scores, strict=True)}
    wins = [_win([mean[number, name] for name in row]) for number, row in asked]
    groups = _trial_groups(examples, [number for number, _ in asked])
    low, high = bootstrap(wins, [1] * len(wins), groups, seed)
    return Figure(float(np.mean(wins)), low, high, len(wins), chance=1 / candidates)


def category_choice(
    scorer: Scorer,
    examples: Sequence[HeldOut],
    question: str | Callable[[HeldOut], str],
    categories: Sequence[str] | None = None,
    answer: Callable[[str], str] = str,
    blank: Image | None = None,
    seed: int = 0,
) -> Figure:
    """How much oftener the true category is the likeliest answer with the image than without it.

    value = accuracy with the right image - accuracy with a blank one. The candidates are the
    categories, each as the answer to `question` in a conversation, compared by the likelihood of
    the whole answer (end of turn included).

    Args:
        question: what the user asks beside the image, or a function of the example.
        categories: all candidates; those of the held-out set if not given.
        answer: a category as the assistant says it.
        blank: the image that shows nothing; white if not given.

    Raises:
        ValueError: fewer than two categories.
    """
    held = [example for example in examples if example.category is not None]
    names = sorted({*(categories or ()), *(str(example.category) for example in held)})
    if len(names) < 2 or not held:
        raise ValueError(f"a choice needs examples of two categories; the set has {len(names)}")
    ask = question if callable(question) else lambda _: question
    nothing = blank or blank_image()

    def pick(image_of: Callable[[HeldOut], Image]) -> list[float]:
        asked = [(image_of(example), ask(example)) for example in held]
        pairs = list(dict.fromkeys((image, text, name) for image, text in asked for name in names))
        documents = [
            Document.conversation([("user", [image, text]), ("assistant", [answer(name)])])
            for image, text, name in pairs
        ]
        scores = {pair: nll for pair, (nll, _) in zip(pairs, scorer(documents), strict=True)}
        return [
            _win(
                [scores[image, text, str(example.category)]]
                + [scores[image, text, name] for name in names if name != example.category]
            )
            for example, (image, text) in zip(held, asked, strict=True)
        ]

    seen, unseen = pick(lambda example: example.image), pick(lambda _: nothing)
    groups = by_caption(held)
    gains = [a - b for a, b in zip(seen, unseen, strict=True)]
    ones = [1.0] * len(held)
    low, high = bootstrap(gains, ones, groups, seed)
    counts = {name: sum(example.category == name for example in held) for name in names}
    parts: dict[str, Any] = {
        "right": float(np.mean(seen)),
        "right_interval": bootstrap(seen, ones, groups, seed),
        "blank": float(np.mean(unseen)),
        "categories": counts,
        "commonest": max(counts.values()) / len(held),
    }
    parts["chance"] = 1 / len(names)
    return Figure(float(np.mean(gains)), low, high, len(held), chance=0.0, parts=parts)


def _win(nlls: Sequence[float]) -> float:
    """1 if the first is the smallest, 0 if not, its share of a tie."""
    best = min(nlls)
    return float(nlls[0] == best) / sum(nll == best for nll in nlls)


def _trial_groups(examples: Sequence[HeldOut], trials: Sequence[int]) -> list[list[int]]:
    """Trials grouped by the caption of the image they are about."""
    groups: dict[str, list[int]] = {}
    for trial, number in enumerate(trials):
        groups.setdefault(normalised(examples[number].caption), []).append(trial)
    return list(groups.values())


def _some(examples: Sequence[HeldOut]) -> None:
    if not examples:
        raise ValueError("no held-out examples: is the data prepared?")
