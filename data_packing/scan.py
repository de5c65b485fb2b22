"""Looking at every document of many shards, over worker processes: what `info` and `lint` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from data_packing.document import Document, DocumentError
from data_packing.executors import Executor
from data_packing.files import OpenFiles
from data_packing.index import source_name, source_names
from data_packing.sample import Cost
from data_packing.shards import expand, load_index, parse_span
from data_packing.slices import ImageCost

CHUNK = 64
"""Documents that a worker looks at in one go."""

MUCH = 256 * 2**20
"""Bytes from which starting processes takes less time than it saves."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rules:
    """What a model says of documents, handed in by its owner; picklable.

    Attributes:
        cost: what a document costs in text tokens; raises DocumentError to refuse it.
        image_cost: (height, width) -> (language tokens, vision patches).
        special: the first special token's string in a text, None where there is none.
    """

    cost: Callable[[Document], Cost]
    image_cost: ImageCost
    special: Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Documents [start, stop) of a shard."""

    source: str
    shard: Path
    start: int = 0
    stop: int = 0


def find_sources(patterns: Sequence[str], allow_http: bool = False) -> dict[str, list[Path]]:
    """The shards of each source, by its name; shards `name-000000.tar`, … in a folder are one.

    Indexes and token caches, which a shell's `*` brings along, are left out.

    Raises:
        ValueError: a pattern matches nothing, or only such files.
    """
    found = {path for pattern in patterns for path in expand(pattern, allow_http)}
    shards = sorted(path for path in found if path.suffix != ".npz")
    if not shards:
        raise ValueError(f"no shard (.tar) in {', '.join(patterns)}")
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in shards:
        groups.setdefault((path.absolute().parent, source_name([path])), []).append(path)
    return dict(zip(source_names(list(groups.values())), groups.values(), strict=True))


def divided(source: str, shard: Path, documents: int) -> list[Chunk]:
    """All documents of a shard, in chunks."""
    starts = range(0, documents, CHUNK)
    return [Chunk(source, shard, start, min(start + CHUNK, documents)) for start in starts]


def read_chunk(chunk: Chunk) -> Iterator[tuple[int, Document | DocumentError]]:
    """Every document of a chunk with its row, or why it cannot be read."""
    arrays = cached_index(chunk.shard)
    with OpenFiles() as files:
        for row in range(chunk.start, chunk.stop):
            size, offset = int(arrays["size"][row]), int(arrays["offset"][row])
            try:
                span = files.read(chunk.shard, max(0, offset), max(0, size))
                yield row, parse_span(span, int(arrays["crc"][row]))
            except DocumentError as error:
                yield row, error


@lru_cache(maxsize=4)
def cached_index(shard: Path) -> dict[str, NDArray[Any]]:
    """The index of a shard, kept while its chunks are looked at."""
    return load_index(shard)


def processes(sources: dict[str, list[Path]], asked: int | None) -> int:
    """How many to work in: as asked; else one for little data, and as many as it may for more."""
    if asked is not None:
        return asked
    size = sum(path.stat().st_size for paths in sources.values() for path in paths)
    return len(os.sched_getaffinity(0)) if size >= MUCH else 1


def scan(
    work: Callable[[Chunk], T], chunks: Sequence[Chunk], executor: Executor
) -> Iterator[tuple[Chunk, T]]:
    """Do the same for every chunk, in order; the results come as they are ready.

    Args:
        work: picklable, with what it needs.
        executor: who does it.

    Raises:
        ValueError: a worker was killed.
    """
    cached_index.cache_clear()
    yield from zip(chunks, executor.each(work, chunks), strict=True)
