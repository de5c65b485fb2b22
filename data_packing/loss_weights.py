"""How much every learned token counts in the loss.

T tokens of a pack, n documents, K objectives, S sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        uses: [S][K], 1 where an objective learns from a source, else 0; left out, one objective
            that learns from all.

    Raises:
        ValueError: no such rule, or no such table.
    """

    rule: str = "token"
    uses: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"loss weights {self.rule!r}: expected one of {', '.join(RULES)}")
        for row in self.uses:
            if not row or len(row) != len(self.uses[0]) or set(row) - {0, 1}:
                raise ValueError(
                    f"uses: a row of 0 and 1 per source, all of one length, not {self.uses}"
                )

    @property
    def objectives(self) -> int:
        """K."""
        return len(self.uses[0]) if self.uses else 1

    def weigh(
        self, labels: NDArray[np.int64], ends: NDArray[np.int32], sources: Sequence[int]
    ) -> NDArray[np.float32]:
        """The weights [K, T] of a pack, 0 where nothing is learned.

        Args:
            labels: [T], -100 where nothing is learned.
            ends: [n+1], where documents start, and T. A document that was cut counts by what of
                it is in the pack.
            sources: [n], of the documents; not read without `uses`.
        """
        learned = labels != IGNORED
        before = np.concatenate([[0], np.cumsum(learned)])
        counts = np.diff(before[ends]).astype(np.float64)
        worth = RULES[self.rule](np.maximum(counts, 1))
        if self.uses:
            assert len(sources) == len(counts), (len(sources), len(counts))
            used = np.array(self.uses, dtype=np.float64)[np.array(sources, dtype=np.intp)].T
            worth = used * worth
        weights: Floats = np.repeat(np.atleast_2d(worth), np.diff(ends), axis=1) * learned
        return weights.astype(np.float32)


EVEN = Weighting()
"""Every learned token counts 1, for one objective."""
