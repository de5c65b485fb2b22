"""How much every learned token counts in the loss.

T tokens of a pack, n documents, K objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_packing.sample import IGNORED

Floats = NDArray[np.float64]

RULES: dict[str, Callable[[Floats], Floats]] = {
    "token": np.ones_like,
    "sample": lambda learned_n: 1 / learned_n,
    "sqrt": lambda learned_n: 1 / np.sqrt(learned_n),
}
"""Learned tokens of documents [n], each 1 or more -> what one of them counts [n].

With `token` a document counts as much as it is long, with `sample` all documents count alike;
`sqrt` lies between: the "square averaging" of InternVL 2.5 (arXiv 2412.05271, loss reweighting).
"""


@dataclass(frozen=True, slots=True)
class Weighting:
    """How a run weighs what it learns.

    Attributes:
        rule: a name in `RULES`.
        objectives: how many there are.

    Raises:
        ValueError: no such rule, or no objective.
    """

    rule: str = "token"
    objectives: int = 1

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"loss weights {self.rule!r}: expected one of {', '.join(RULES)}")
        if self.objectives < 1:
            raise ValueError(f"{self.objectives} objectives: expected 1 or more")

    def weigh(self, labels: NDArray[np.int64], ends: NDArray[np.int32]) -> NDArray[np.float32]:
        """The weights [K, T] of a pack, 0 where nothing is learned.

        Args:
            labels: [T], -100 where nothing is learned.
            ends: [n+1], where documents start, and T. A document that was cut counts by what of
                it is in the pack.
        """
        learned = labels != IGNORED
        before = np.concatenate([[0], np.cumsum(learned)])
        counts = np.diff(before[ends]).astype(np.float64)
        worth = RULES[self.rule](np.maximum(counts, 1))
        row = np.repeat(worth, np.diff(ends)) * learned
        return np.tile(row.astype(np.float32), (self.objectives, 1))


EVEN = Weighting()
"""Every learned token counts 1, for one objective."""
