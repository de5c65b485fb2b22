"""Packs for one rank, in the order of the plan, read and decoded by worker processes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from data_packing.document import DocumentError
from data_packing.encoding import Encode, encode_entry
from data_packing.files import OpenFiles
from data_packing.index import Index, Place
from data_packing.ledger import Refusal
from data_packing.loss_weights import EVEN, Weighting
from data_packing.pack import TENSORS, Empty, Pack, collate, plain
from data_packing.plan import Plan
from data_packing.planned import Cursor, Entry, PlannedPack, PlannedStep, micro_packs
from data_packing.shards import parse_span
from data_packing.workers import Job, Memory, Shape, Workers

ImageBytes = Callable[[int, int], int]
"""(height, width) of an image -> bytes of the pixels that `encode` makes of it, all its views."""

PREFETCH = 256 * 1024 * 1024
"""Bytes of packs that the workers of a rank prepare ahead, unless the caller says otherwise."""

_LEAST = 256 * 1024  # what a pack counts for at least: its objects and its way here cost too
_TOKEN_BYTES = 28  # id, label, position and one weight
_SHARED_FROM = 1024 * 1024  # smaller pixels go through the socket: shared memory costs more
_SLOW = 0.002  # seconds of one read after which the others of a pack go side by side
_READS = 32


class Loader:
    """Yields whole steps: the planned step and this rank's packs of it.

    Every rank gets equally many packs per step; where it has none it gets `Pack.empty()`. A
    document that cannot be read, decoded or encoded as planned is left out of its pack and stands
    in `pack.refused` with the reason; every other exception ends the run and names the document.

    The script that trains must be importable (`if __name__ == "__main__":`), because workers are
    not forked from it.

    Args:
        plan: the plan of the run.
        encode: from a document to a sample; picklable if workers > 0.
        rank, world: this process among those that share a step.
        workers: processes; 0 reads in this one.
        cursor: where to start; None at the beginning.
        prefetch: bytes of packs that all workers together prepare ahead; one pack in any case.
        image_bytes: of an image in a pack; left out, its own pixels, three bytes each.
        files: what reads the shards.
        weighting: how much learned tokens count, by the plan's sources; left out, all alike, for
            one objective.

    Raises:
        ValueError: the cursor is no place of the plan, or the weighting is for other sources.
    """

    def __init__(
        self,
        plan: Plan,
        encode: Encode,
        *,
        rank: int,
        world: int,
        workers: int,
        cursor: Cursor | None = None,
        prefetch: int = PREFETCH,
        image_bytes: ImageBytes = lambda height, width: 3 * height * width,
        files: OpenFiles | None = None,
        weighting: Weighting = EVEN,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(f"workers is {workers} (0 or more), prefetch {prefetch} (1 or more)")
        self.plan, self.cursor = plan, cursor
        self.rank, self.world = rank, world
        self.workers, self.prefetch, self.image_bytes = workers, prefetch, image_bytes
        sources = [index.name for index in plan.first.indexes]
        files = files or OpenFiles()
        self.reader = _Reader(sources, encode, plan.across_documents, files, weighting)

    def __iter__(self) -> Iterator[tuple[PlannedStep, list[Pack]]]:
        ahead: deque[tuple[PlannedStep, int]] = deque()
        packs: list[Pack] = []
        with closing(self._packs(ahead)) as made:
            for pack in made:
                packs.append(pack)
                if len(packs) == ahead[0][1]:
                    yield ahead.popleft()[0], packs
                    packs = []

    def _packs(self, ahead: deque[tuple[PlannedStep, int]]) -> Generator[Pack, None, None]:
        """This rank's packs in order; `ahead` gets the steps they belong to."""
        if self.workers == 0:
            try:
                for job in self._jobs(ahead):
                    yield self.reader.pack(job.work, self.reader.fetch(job.work))
            finally:
                self.reader.close()
            return
        workers = Workers(self.reader, self.workers, __name__)
        try:
            with closing(workers.answers(lambda: self._jobs(ahead), self.prefetch)) as answers:
                for values, pixels in answers:
                    yield _outline(values if pixels is None else values | {"pixels": pixels})
        finally:
            # A consumer that stops early must not leave workers to the garbage collector.
            workers.close()

    def _jobs(self, ahead: deque[tuple[PlannedStep, int]]) -> Iterator[Job]:
        for step in self.plan.steps(self.cursor):
            own = micro_packs(step, self.rank, self.world)
            ahead.append((step, len(own)))
            for planned in own:
                yield self._job(planned) if planned is not None else Job(None, 0)

    def _job(self, planned: PlannedPack) -> Job:
        indexes = planned.indexes
        places = [indexes[entry.source].place(entry.document) for entry in planned.entries]
        pixels = sum(self._pixel_bytes(indexes[entry.source], entry) for entry in planned.entries)
        work = _Work(planned.number, tuple(zip(planned.entries, places, strict=True)))
        size = max(_LEAST, _TOKEN_BYTES * planned.tokens + pixels)
        return Job(work, size, pixels if pixels >= _SHARED_FROM else 0)

    def _pixel_bytes(self, index: Index, entry: Entry) -> int:
        first = int(index.piece_start[entry.document])
        start, stop = index.piece_image_start[[first + entry.start_piece, first + entry.stop_piece]]
        heights, widths = index.height[start:stop].tolist(), index.width[start:stop].tolist()
        return sum(map(self.image_bytes, heights, widths))


@dataclass(frozen=True, slots=True)
class _Work:
    """A planned pack with the places of its documents: all that a worker needs to know."""

    number: int
    entries: tuple[tuple[Entry, Place], ...]


class _Reader:
    """What workers run: a job in, a pack out. It holds no index, so workers stay small."""

    def __init__(
        self,
        sources: list[str],
        encode: Encode,
        across_documents: bool,
        files: OpenFiles,
        weighting: Weighting,
    ) -> None:
        if weighting.uses and len(weighting.uses) != len(sources):
            raise ValueError(f"uses of {len(weighting.uses)} sources, the plan has {len(sources)}")
        self.sources, self.encode, self.files = sources, encode, files
        self.across_documents, self.weighting = across_documents, weighting
        self.threads: ThreadPoolExecutor | None = None

    def fetch(self, work: _Work | None) -> list[bytes | OSError]:
        """The bytes of the documents, or why they cannot be read."""
        found: list[bytes | OSError] = []
        places = [] if work is None else [place for _, place in work.entries]
        while len(found) < len(places):
            started = time.perf_counter()
            found.append(self._span(places[len(found)]))
            if time.perf_counter() - started > _SLOW:
                self.threads = self.threads or ThreadPoolExecutor(_READS)
                found += self.threads.map(self._span, places[len(found) :])
        return found

    def make(
        self, work: _Work | None, fetched: list[bytes | OSError], memory: Memory | None
    ) -> tuple[dict[str, Any], Shape | None]:
        """The pack with arrays for tensors, its pixels in the memory if they fit."""
        used: list[Shape] = []

        def empty(size: int) -> Memory:
            if memory is None or size > len(memory):
                return plain(size)
            used.append((size,))
            return memory[:size]

        pack = self.pack(work, fetched, empty)
        values = {field.name: getattr(pack, field.name) for field in fields(pack)}
        values |= {name: values[name].numpy() for name in TENSORS}
        return (values | {"pixels": None}, used[0]) if used else (values, None)

    def pack(
        self, work: _Work | None, fetched: list[bytes | OSError], empty: Empty = plain
    ) -> Pack:
        """The pack that was planned, without what cannot be decoded or encoded."""
        if work is None:
            return Pack.empty(self.weighting.objectives)
        samples, origins, refused = [], [], []
        for (entry, place), span in zip(work.entries, fetched, strict=True):
            source = self.sources[entry.source]
            try:
                if isinstance(span, OSError):
                    raise span
                document = parse_span(span, place.crc, place.text)
                samples.append(encode_entry(document, entry, self.encode)[1])
                origins.append(entry.source)
            except DocumentError as error:
                first = None if entry.whole else entry.start_piece
                refused.append(Refusal(source, place.key(), str(error), first))
            except Exception as error:
                name = f"document {place.key()!r} of {source!r} (pack {work.number})"
                raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        pack = collate(samples, work.number, self.across_documents, empty, self.weighting, origins)
        pack.refused = refused
        return pack

    def close(self) -> None:
        """Close files and threads."""
        if self.threads is not None:
            self.threads.shutdown()
            self.threads = None
        self.files.close()

    def _span(self, place: Place) -> bytes | OSError:
        try:
            return self.files.read(place.path, place.offset, place.size)
        except OSError as error:
            return error


def _outline(values: dict[str, Any]) -> Pack:
    """A pack from what `make` made."""
    arrays = {name: np.require(values[name], requirements="W") for name in TENSORS}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Pack(**(values | tensors))
