"""Which documents come when: passes over each source, shuffled, without end.

`weight` is the number of passes over a source in one epoch: 1.0 takes every document once, 2.0
twice, 0.5 takes half of them in one epoch and the other half in the next. Each pass has its own
order, and every epoch shuffles all its sources together. Orders come from a hash, not from a random
number generator whose stream may change between versions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

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


class Mixture:
    """The endless stream of units (whole documents or slices) of several sources.

    Args:
        counts: units in each source.
        weights: passes over each source per epoch.
        seed: of every order.

    Raises:
        ValueError: a weight is not a positive number, or no source has any unit.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if len(counts) != len(weights):
            raise ValueError(f"{len(counts)} sources but {len(weights)} weights")
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise ValueError(f"a source has weight {weight}; it must be above 0")
        if sum(counts) == 0:
            raise ValueError("no source has a usable document (see the ledger for the reasons)")
        self.counts = list(counts)
        self.weights = [Fraction(str(weight)) for weight in weights]
        self.seed = seed
        self._epochs: OrderedDict[int, Picks] = OrderedDict()

    def start(self, epoch: int) -> int:
        """The place in the stream where an epoch (from 0) starts."""
        return sum(self._reached(source, epoch) for source in range(len(self.counts)))

    def take(self, start: int, stop: int) -> Picks:
        """The units at places [start, stop) of the stream."""
        sources, units = [], []
        epoch = self._epoch_at(start)
        while start < stop:
            first, after = self.start(epoch), self.start(epoch + 1)
            until = min(stop, after)
            source, unit = self._epoch(epoch)
            sources.append(source[start - first : until - first])
            units.append(unit[start - first : until - first])
            start, epoch = until, epoch + 1
        if not units:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        return np.concatenate(sources), np.concatenate(units)

    def _reached(self, source: int, epoch: int) -> int:
        return int(self.weights[source] * self.counts[source] * epoch)

    def _epoch_at(self, place: int) -> int:
        low, high = 0, 1
        while self.start(high) <= place:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            if self.start(middle) <= place:
                low = middle
            else:
                high = middle
        return low

    def _epoch(self, epoch: int) -> Picks:
        """All units of one epoch, in order; the last two asked for are kept."""
        picks = self._epochs.get(epoch)
        if picks is None:
            sources, units = [], []
            for source, count in enumerate(self.counts):
                at, stop = self._reached(source, epoch), self._reached(source, epoch + 1)
                while at < stop:
                    number, inside = divmod(at, count)
                    order = shuffled(count, self.seed, 1, source, number)
                    part = order[inside : inside + stop - at]
                    sources.append(np.full(len(part), source, dtype=np.int32))
                    units.append(part)
                    at += len(part)
            source_of = np.concatenate(sources) if sources else np.zeros(0, dtype=np.int32)
            unit_of = np.concatenate(units) if units else np.zeros(0, dtype=np.int64)
            order = shuffled(len(unit_of), self.seed, 2, epoch)
            picks = self._epochs[epoch] = source_of[order], unit_of[order]
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return picks
