"""The shards of all sources in windows that fit into memory, so that a plan need not hold them all.

A corpus of a billion documents has an index that fits into no machine, and counting its tokens
takes longer than anybody waits. So a plan goes through it window by window: the shards of each
large source are shuffled once and cut into as many groups as there are windows, and window `w`
holds the `w`-th group of each. A source that is smaller than one window is in every window, because
its documents would otherwise all come at one place of the epoch. Every epoch visits the windows in
another order. A corpus smaller than one window, which is most of them, is one window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import ceil
from pathlib import Path
from threading import Event

from data_packing.ahead import Ahead
from data_packing.index import Index
from data_packing.mixture import shuffled
from data_packing.shards import load_index

WINDOW = 2**20
"""Documents planned together: about 120 MB of numbers on every rank, twice while it goes on."""

Stop = Callable[[], bool]
"""Whether nobody waits for the result any more."""

MakeIndex = Callable[[int, Sequence[Path], Stop], Index]
"""(number of the source, some of its shards, when to give up) -> their index."""


class Corpus:
    """Sources of shards, indexed a window at a time.

    Args:
        shards: those of each source, in an order that is always the same.
        index: makes the index of a source's shards; called from a background thread for what
            comes next.
        window: about how many documents a window holds. How many a source has is taken from its
            first shard, since to know it exactly every shard would have to be asked.
        seed: of the windows' order and of who is in which.

    Attributes:
        windows: how many there are.
        resident: by source, whether all of it is in every window.

    Raises:
        ValueError: `window` below 1, or a shard that cannot be read.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[Path]],
        index: MakeIndex,
        *,
        window: int = WINDOW,
        seed: int = 0,
    ) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self.seed = seed
        documents = [_documents(paths) for paths in shards]
        self.windows = max(1, ceil(sum(n for n in documents if n > window) / window))
        self.resident = [
            self.windows == 1 or count <= window or len(paths) < self.windows
            for count, paths in zip(documents, shards, strict=True)
        ]
        self._groups = [
            [list(paths)] if resident else self._cut(paths, source)
            for source, (paths, resident) in enumerate(zip(shards, self.resident, strict=True))
        ]
        self._index, self._stop = index, Event()
        self._shares: dict[int, list[Fraction]] = {}
        self._everywhere = Ahead(self._whole, len(shards))

    @classmethod
    def of(cls, indexes: Sequence[Index]) -> Corpus:
        """A corpus of one window, whose indexes are there already."""
        corpus = cls([], lambda source, paths, stop: indexes[source])
        corpus.resident = [True] * len(indexes)
        corpus._groups = [[index.paths] for index in indexes]
        corpus._everywhere = Ahead(indexes.__getitem__, len(indexes))
        return corpus

    def at(self, visit: int) -> int:
        """The window of a visit; `windows` visits are an epoch."""
        if self.windows == 1:
            return 0
        epoch, number = divmod(visit, self.windows)
        return int(shuffled(self.windows, self.seed, 4, epoch)[number])

    def load(self, window: int) -> list[Index]:
        """The indexes of a window, one per source.

        Raises:
            ValueError: a shard is missing, unfinished or damaged.
        """
        stop = self._stop.is_set
        return [
            self._everywhere.get(source)
            if resident
            else self._index(source, self._groups[source][window], stop)
            for source, resident in enumerate(self.resident)
        ]

    def rest(self) -> None:
        """Give up what is being indexed in the background; who asks again begins again."""
        self._stop.set()
        self._stop = Event()

    def share(self, source: int, window: int) -> tuple[Fraction, Fraction]:
        """Where a window starts and stops in a source, 0 to 1, by documents.

        The first call asks every shard of the source how many it has.
        """
        if source not in self._shares:
            groups = self._groups[source]
            found = [sum(map(_count, group)) for group in groups]
            ends = [0, *accumulate(found)]
            self._shares[source] = [Fraction(end, max(1, ends[-1])) for end in ends]
        return self._shares[source][window], self._shares[source][window + 1]

    def shards(self, source: int, window: int) -> int:
        """How many shards of a source are in a window."""
        return len(self._groups[source][0 if self.resident[source] else window])

    @property
    def listing(self) -> str:
        """A hash of the shards' names and of which window each is in."""
        names = [[[path.name for path in group] for group in groups] for groups in self._groups]
        return hashlib.sha256(repr(names).encode()).hexdigest()

    def _whole(self, source: int) -> Index:
        return self._index(source, self._groups[source][0], self._stop.is_set)

    def _cut(self, paths: Sequence[Path], source: int) -> list[list[Path]]:
        order = shuffled(len(paths), self.seed, 5, source)
        bounds = [number * len(paths) // self.windows for number in range(self.windows + 1)]
        return [
            [paths[at] for at in sorted(order[start:stop].tolist())]
            for start, stop in pairwise(bounds)
        ]


def _documents(paths: Sequence[Path]) -> int:
    """About how many documents shards hold; one shard cannot be cut, so it is not asked."""
    return len(paths) * _count(paths[0]) if len(paths) > 1 else 0


def _count(shard: Path) -> int:
    return len(load_index(shard)["offset"])
