"""What a plan says: the packs of every step, and where in the stream a step ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_packing.balance import PackCost, deal
from data_packing.index import Index


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a run has come.

    Attributes:
        step: steps taken.
        visit, block, offset: where the next step starts: the visit to a window of the corpus, the
            block of what it takes, the pack inside it.
        window: the fingerprint of that window; empty before the first step.
    """

    step: int = 0
    visit: int = 0
    block: int = 0
    offset: int = 0
    window: str = ""

    def to_json(self) -> dict[str, int | str]:
        """As a dictionary of four numbers and a hash."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        """From what `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        numbers = [value.get(name) for name in ("step", "visit", "block", "offset")]
        if (
            len(value) != 5
            or not all(type(number) is int and number >= 0 for number in numbers)
            or not isinstance(value.get("window"), str)
        ):
            raise ValueError(f"not a data cursor: {value!r}")
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Entry:
    """A document, or a slice of one, in a pack.

    Attributes:
        source: number of its index in the window.
        document: its number in that index.
        start_piece, stop_piece: which of its pieces.
        whole: whether that is all of it.
        tokens: how many tokens it takes.
    """

    source: int
    document: int
    start_piece: int
    stop_piece: int
    whole: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """A pack before anything is read: its global number, its entries, what they take together.

    `pairs` are those of tokens that attend to each other, the sum of squared document lengths.
    `indexes` are those of the window, in which the entries' documents have their numbers.
    """

    number: int
    entries: tuple[Entry, ...]
    tokens: int
    pairs: int
    patches: int
    indexes: Sequence[Index] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The packs between two updates of the model; `after` goes into the checkpoint."""

    number: int
    packs: tuple[PlannedPack, ...]
    after: Cursor

    def costs(self, cost: PackCost) -> NDArray[np.float64]:
        """What each pack costs."""
        held = np.array([(pack.tokens, pack.pairs, pack.patches) for pack in self.packs])
        return cost.of(*held.T)


def micro_packs(step: PlannedStep, rank: int, world: int) -> list[PlannedPack | None]:
    """The packs of a step that a rank works on, in order, as `deal` gives them out.

    Every rank gets equally many; None stands for a pack that a rank does not have.
    """
    own = deal(len(step.packs), rank, world)
    return [None if at is None else step.packs[at] for at in own]
