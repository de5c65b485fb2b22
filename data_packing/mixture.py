"""Which documents come when: passes over each source, shuffled.

`weight` is the number of passes over a source in one epoch: 1.0 takes every document once, 2.0
twice, 0.5 takes half of them in one epoch and the other half in the next. `cap` is the most
documents (or slices) that an epoch takes of a source, whatever its weight; the next epoch takes
others. Each pass has its own order, and every visit to the data shuffles all its sources together.
Orders come from a hash, not from a random number generator whose stream may change between
versions.

A corpus in one window is visited once per epoch. One in several windows (corpus.py) is visited
window by window. There a source that is in every window gives each visit its part of an epoch, a
cap is shared out among the windows of its source by their documents, and a weight that is no whole
number takes its share of each window, rounded so that all together are right to a document or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np
from numpy.typing import NDArray

from data_packing.ahead import Ahead

Picks = tuple[NDArray[np.int32], NDArray[np.int64]]
"""(source, unit) of consecutive places of the stream."""


def shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on `key` alone, on every machine and version."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for number in key:
            state = _mix(np.array([state ^ np.uint64(number & 0xFFFFFFFFFFFFFFFF)]))[0]
        values = _mix(np.arange(count, dtype=np.uint64) + state)
    return np.argsort(values, kind="stable")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Rate:
    """How much of a source an epoch takes.

    Attributes:
        weight: passes over the source.
        cap: the most units (documents, or their slices), None for no limit.

    Raises:
        ValueError: a weight that is no positive number, or a cap below 1.
    """

    weight: float = 1.0
    cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"a source has weight {self.weight}; it must be above 0")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"a source has cap {self.cap}; it must be at least 1")

    def of(self, count: int) -> Fraction:
        """Units that the weight takes in an epoch, of `count` units."""
        return Fraction(str(self.weight)) * count


_GOLDEN = 0x9E3779B97F4A7C15  # of 2^64: its multiples spread evenly


@dataclass(frozen=True, slots=True)
class Part:
    """The units of one source in one window, and how many of them each visit takes.

    Attributes:
        count: units.
        per_turn: how many of them a turn takes; a fraction is made up for by later turns.
        every: visits between two turns: 1 where each visit is one, the number of windows where
            only one visit of an epoch comes here.
        offset: 0 to 1, so that the windows of a source do not all round down in the same turn.
        key: of its orders.
        below: of a cap that is shared out among windows, what the windows before this one get.
    """

    count: int
    per_turn: Fraction
    every: int
    offset: Fraction
    key: tuple[int, ...]
    below: Fraction | None = None

    @classmethod
    def everywhere(cls, rate: Rate, count: int, source: int, windows: int) -> Part:
        """The part of a source that is in every window."""
        units = rate.of(count)
        units = units if rate.cap is None else min(units, Fraction(rate.cap))
        return cls(count, units / windows, 1, Fraction(0), (source,))

    @classmethod
    def inside(
        cls,
        rate: Rate,
        count: int,
        source: int,
        window: int,
        windows: int,
        share: tuple[Fraction, Fraction] | None,
    ) -> Part:
        """The part of a source that is in one window.

        Args:
            share: where the window starts and stops in the source, 0 to 1; for a cap.
        """
        units, key = rate.of(count), (source, window)
        if rate.cap is not None:
            assert share is not None
            low, high = (rate.cap * bound for bound in share)
            if high - low < units:
                return cls(count, high - low, windows, Fraction(0), key, low)
        return cls(count, units, windows, Fraction(window, windows), key)

    def span(self, visit: int) -> tuple[int, int]:
        """Where a visit starts and stops in the endless row of passes over the units."""
        turn = visit // self.every
        if self.below is not None:
            before = sum(self._capped(number) for number in range(turn))
            return before, before + self._capped(turn)
        start, stop = (self.per_turn * (turn + more) + self.offset for more in (0, 1))
        return int(start), int(stop)

    def _capped(self, turn: int) -> int:
        """Units of a turn: the windows' together are the cap, since each starts where one ends.

        Where the bounds are rounded moves from turn to turn, so every window has its share.
        """
        assert self.below is not None
        start = self.below + Fraction(turn * _GOLDEN % 2**64, 2**64)
        return floor(start + self.per_turn) - floor(start)


class Mixture:
    """The stream of units (whole documents or slices) of several sources.

    Args:
        parts: one per source.
        seed: of every order.
        first: the visit that the stream starts with.
        last: the visit before which it ends; None for no end. Only where every visit is a turn of
            every part does it reach beyond one visit.

    Raises:
        ValueError: an endless stream without any unit.
    """

    def __init__(
        self, parts: Sequence[Part], seed: int, first: int = 0, last: int | None = None
    ) -> None:
        self.parts, self.seed = list(parts), seed
        self.first, self.last = first, last
        if last is None and not any(part.count for part in parts):
            raise ValueError("no source has a unit, so the stream has no end and no start")
        self._visits = Ahead(self._shuffle)

    @property
    def length(self) -> int | None:
        """Units of the stream; None if it has no end."""
        return None if self.last is None else self.start(self.last)

    def start(self, visit: int) -> int:
        """The place in the stream where a visit starts."""
        if visit == self.first:
            return 0
        return sum(part.span(visit - 1)[1] - part.span(self.first)[0] for part in self.parts)

    def take(self, start: int, stop: int) -> Picks:
        """The units at places [start, stop) of the stream, as far as it goes."""
        stop = stop if self.length is None else min(stop, self.length)
        sources, units = [], []
        visit = self._visit_at(start)
        while start < stop:
            first, after = self.start(visit), self.start(visit + 1)
            until = min(stop, after)
            source, unit = self._visits.get(visit)
            sources.append(source[start - first : until - first])
            units.append(unit[start - first : until - first])
            start, visit = until, visit + 1
        if not units:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        return np.concatenate(sources), np.concatenate(units)

    def _visit_at(self, place: int) -> int:
        low, high = self.first, self.first + 1
        while self.start(high) <= place and (self.last is None or high < self.last):
            low, high = high, self.first + 2 * (high - self.first)
        while high - low > 1:
            middle = (low + high) // 2
            if self.start(middle) <= place:
                low = middle
            else:
                high = middle
        return low

    def _shuffle(self, visit: int) -> Picks:
        """All units of one visit, in order."""
        sources, units = [], []
        for source, part in enumerate(self.parts):
            at, stop = part.span(visit)
            while at < stop:
                number, inside = divmod(at, part.count)
                order = shuffled(part.count, self.seed, 1, *part.key, number)
                own = order[inside : inside + stop - at]
                sources.append(np.full(len(own), source, dtype=np.int32))
                units.append(own)
                at += len(own)
        source_of = np.concatenate(sources) if sources else np.zeros(0, dtype=np.int32)
        unit_of = np.concatenate(units) if units else np.zeros(0, dtype=np.int64)
        order = shuffled(len(unit_of), self.seed, 2, visit)
        return source_of[order], unit_of[order]
