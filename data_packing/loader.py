"""Packs for one rank, in the order of the plan, read and decoded by worker processes."""

from __future__ import annotations

import multiprocessing
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_packing.document import DocumentError
from data_packing.encoding import Encode, encode_entry
from data_packing.files import OpenFiles
from data_packing.index import Index, Place
from data_packing.ledger import Refusal
from data_packing.pack import TENSORS, Pack, collate
from data_packing.plan import Cursor, Entry, Plan, PlannedPack, PlannedStep, micro_packs
from data_packing.shards import parse_span

_SMALL_SHARED_MEMORY = 512 * 1024 * 1024


class Loader:
    """Yields whole steps: the planned step and this rank's packs of it.

    Every rank gets equally many packs per step; where it has none it gets `Pack.empty()`. A
    document that cannot be read, decoded or encoded as planned is left out of its pack and stands
    in `pack.refused` with the reason; every other exception ends the run and names the document.

    Workers are started by a fork server, not forked from this process: a training process has
    threads (gloo, NCCL, autograd), and a fork copies their locks but not the threads. The script
    that trains must therefore be importable (`if __name__ == "__main__":`).

    Args:
        plan: the plan of the run.
        indexes: the plan's indexes, to read from.
        encode: from a document to a sample; picklable if workers > 0.
        rank, world: this process among those that share a step.
        workers: processes; 0 reads in this one.
        cursor: where to start; None at the beginning.
        prefetch: packs that each worker prepares ahead.

    Raises:
        ValueError: the cursor is no place of the plan.
    """

    def __init__(
        self,
        plan: Plan,
        indexes: Sequence[Index],
        encode: Encode,
        *,
        rank: int,
        world: int,
        workers: int,
        cursor: Cursor | None = None,
        prefetch: int = 2,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(f"workers is {workers} (0 or more), prefetch {prefetch} (1 or more)")
        self.plan, self.cursor = plan, cursor
        self.rank, self.world = rank, world
        self.workers, self.prefetch = workers, prefetch
        inline = workers > 0 and _little_shared_memory()
        self.indexes = list(indexes)
        sources = [index.name for index in indexes]
        self.reader = _Reader(sources, encode, plan.across_documents, inline)

    def __iter__(self) -> Iterator[tuple[PlannedStep, list[Pack]]]:
        ahead: deque[tuple[PlannedStep, int]] = deque()
        loader: DataLoader[Any] = DataLoader(
            self.reader,
            batch_size=None,
            sampler=_Order(self, ahead),
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            multiprocessing_context=self._context() if self.workers else None,
        )
        packs: list[Pack] = []
        iterator = iter(loader)
        try:
            for pack in iterator:
                packs.append(_outline(pack) if isinstance(pack, dict) else pack)
                if len(packs) == ahead[0][1]:
                    yield ahead.popleft()[0], packs
                    packs = []
        finally:
            # A consumer that stops early must not leave workers to the garbage collector.
            shutdown = getattr(iterator, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()
            self.reader.files.close()

    def _context(self) -> BaseContext:
        if "forkserver" not in multiprocessing.get_all_start_methods():
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return context


class _Order:
    """The sampler: this rank's planned packs themselves, taken as far ahead as workers ask."""

    def __init__(self, loader: Loader, ahead: deque[tuple[PlannedStep, int]]) -> None:
        self.loader, self.ahead = loader, ahead

    def __iter__(self) -> Iterator[_Job | None]:
        loader = self.loader
        for step in loader.plan.steps(loader.cursor):
            own = micro_packs(step, loader.rank, loader.world)
            self.ahead.append((step, len(own)))
            for planned in own:
                yield None if planned is None else self._job(planned)

    def _job(self, planned: PlannedPack) -> _Job:
        indexes = self.loader.indexes
        places = [indexes[entry.source].place(entry.document) for entry in planned.entries]
        return _Job(planned.number, tuple(zip(planned.entries, places, strict=True)))


@dataclass(frozen=True, slots=True)
class _Job:
    """A planned pack with the places of its documents: all that a worker needs to know."""

    number: int
    entries: tuple[tuple[Entry, Place], ...]


class _Reader(Dataset[Any]):
    """What workers run: a job in, a pack out. It holds no index, so workers stay small."""

    def __init__(
        self, sources: list[str], encode: Encode, across_documents: bool, inline: bool
    ) -> None:
        self.sources, self.encode = sources, encode
        self.across_documents, self.inline = across_documents, inline
        self.files = OpenFiles()

    def __getitem__(self, job: _Job | None) -> Pack | dict[str, Any]:
        pack = Pack.empty() if job is None else self._read(job)
        return _inline(pack) if self.inline else pack

    def _read(self, job: _Job) -> Pack:
        samples, refused = [], []
        for entry, place in job.entries:
            source = self.sources[entry.source]
            try:
                span = self.files.read(place.path, place.offset, place.size)
                samples.append(encode_entry(parse_span(span), entry, self.encode)[1])
            except DocumentError as error:
                first = None if entry.whole else entry.start_piece
                refused.append(Refusal(source, place.key(), str(error), first))
            except Exception as error:
                name = f"document {place.key()!r} of {source!r} (pack {job.number})"
                raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        pack = collate(samples, job.number, self.across_documents)
        pack.refused = refused
        return pack


def _little_shared_memory() -> bool:
    """Whether /dev/shm is too small to pass tensors through (64 MB in a default container)."""
    try:
        return shutil.disk_usage("/dev/shm").free < _SMALL_SHARED_MEMORY
    except OSError:
        return False


def _inline(pack: Pack) -> dict[str, Any]:
    """The pack with arrays for tensors: they go through the pipe instead of shared memory."""
    values = {field.name: getattr(pack, field.name) for field in fields(pack)}
    return values | {name: values[name].numpy() for name in TENSORS}


def _outline(values: dict[str, Any]) -> Pack:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values[name])) for name in TENSORS}
    return Pack(**(values | tensors))
