"""Steps of packs that cost alike, so that no rank waits for another.

Packs are equally long, and yet one may cost a third more than the next: attention grows with the
square of a document's length, and images cost what the encoder costs. So the packs of sixteen steps
are sorted by cost and cut into steps of neighbours, and the order of these steps is shuffled.
Nothing of this knows how many ranks there are: `deal` comes after it, and another number of ranks
learns from the same packs in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_packing.mixture import shuffled

WINDOW = 16
"""Steps whose packs are sorted together; the last of a block takes those that are left over."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackCost:
    """What a pack costs: a sum of what it holds. Only ratios matter.

    Attributes:
        tokens: of one language token.
        pairs: of one pair of tokens in one document; a document of L tokens has L^2.
        patches: of one vision patch.

    Raises:
        ValueError: a negative number, or nothing but zeros.
    """

    tokens: float = 1.0
    pairs: float = 0.0
    patches: float = 0.0

    def __post_init__(self) -> None:
        values = (self.tokens, self.pairs, self.patches)
        if not all(0 <= value < float("inf") for value in values) or not any(values):
            raise ValueError(f"{self}: give numbers of at least 0, and one above it")

    def of(self, tokens: Counts, pairs: Counts, patches: Counts) -> NDArray[np.float64]:
        """The costs of packs that hold these."""
        cost: NDArray[np.float64] = (
            self.tokens * tokens + self.pairs * pairs + self.patches * patches
        )
        return cost


def contents(
    packs: Sequence[Sequence[int]], tokens: Counts, patches: Counts, across_documents: bool
) -> tuple[Counts, Counts, Counts]:
    """Tokens, pairs and patches of packs, given those of their documents."""
    starts = np.cumsum([0, *map(len, packs)])[:-1]
    places = np.concatenate(packs).astype(np.int64)
    own = tokens[places]
    total = np.add.reduceat(own, starts)
    pairs = total * total if across_documents else np.add.reduceat(own * own, starts)
    return total, pairs, np.add.reduceat(patches[places], starts)


def balanced(costs: NDArray[np.float64], step: int, *key: int, head: int = 0) -> Counts:
    """The order in which the packs of a block make steps.

    Args:
        costs: of the packs, in the order of packing.
        step: packs of a step.
        key: of the shuffling.
        head: packs that complete the last step of the block before, whose own are cheap ones.

    Returns:
        Positions in `costs`: the head, then `step` at a time the packs of a step, from dear to
        cheap. A rest too small for a step stays last: the cheapest packs of the last window.
    """
    order = []
    steps = max(0, len(costs) - head) // step
    windows = max(1, steps // WINDOW)
    for window in range(windows):
        start = head + window * WINDOW * step if window else 0
        stop = len(costs) if window == windows - 1 else head + (window + 1) * WINDOW * step
        by_cost = start + np.argsort(-costs[start:stop], kind="stable")
        if window == 0 and head:
            order.append(by_cost[-head:])
            by_cost = by_cost[:-head]
        whole = len(by_cost) // step
        cut = by_cost[: whole * step].reshape(whole, step)
        order += [cut[shuffled(whole, *key, window)].ravel(), by_cost[whole * step :]]
    return np.concatenate(order)


def deal(packs: int, rank: int, world: int) -> list[int | None]:
    """Which packs of a step a rank works on, in order: forth over the ranks, then back, and so on.

    In every micro-step the ranks have neighbours, which cost alike; going back makes the sums over
    a step alike too. Every rank gets equally many; None stands for a pack that a rank does not
    have.

    Raises:
        ValueError: no such rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    own: list[int | None] = []
    for turn, start in enumerate(range(0, packs, world)):
        at = start + (world - 1 - rank if turn % 2 else rank)
        own.append(at if at < packs else None)
    return own


def straggler(steps: Iterable[NDArray[np.float64]], world: int) -> float:
    """The time of the slowest rank over the mean, where ranks wait for each micro-step's slowest.

    Args:
        steps: the costs of each step's packs, in the order of the step.
        world: ranks; one without a pack waits and does nothing.
    """
    slowest = work = 0.0
    for costs in steps:
        dealt = (deal(len(costs), rank, world) for rank in range(world))
        own = np.array([[0.0 if at is None else costs[at] for at in turns] for turns in dealt])
        slowest += float(own.max(axis=0).sum())
        work += float(own.sum()) / world
    return slowest / work
