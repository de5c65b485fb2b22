"""Documents to shards: in this process, or by several from a data set that can be read again.

The records of a data set are numbered; shard `n` holds the usable ones of records [n*k, (n+1)*k).
So several processes can each write some of the shards, and one that is there already need not be
written again: the result is the same bytes however often it was interrupted and by however many
processes it was made.

Shards are written aside, in a hidden folder, and moved when all of them are whole; their indexes
come last. Until then the old shards of that name stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from data_packing.document import Document
from data_packing.files import load_arrays, pack_strings, save_arrays, unpack_strings
from data_packing.ledger import Refusal
from data_packing.shard_file import DUPLICATE, ShardFile
from data_packing.shards import index_path, read_refusals
from data_packing.storage import is_remote, local_folder, place, upload

Item = Document | Refusal
Draft = Callable[[], Item]
"""A record that has not been looked at closely: called, it reads its images."""

Tell = Callable[[int], None]
"""Called now and then with how many records were done so far."""

_POLL_SECONDS = 0.2
_ORPHAN_CHECK = 64  # records between two looks at whether the parent lives


class NothingUsable(ValueError):
    """Every record was refused.

    Attributes:
        refused: all of them.
    """

    def __init__(self, shards: Path, refused: list[Refusal]) -> None:
        reasons = "".join(f"\n  {item.key}: {item.reason}" for item in refused[:5])
        if len(refused) > 5:
            reasons += f"\n  … and {len(refused) - 5:,} more"
        super().__init__(f"no usable document for the shards {shards}{reasons}")
        self.refused = refused


@dataclass(slots=True)
class ShardReport:
    """What was written, and what it was given that cannot be used."""

    paths: list[Path] = field(default_factory=list)
    documents: int = 0
    images: int = 0
    bytes: int = 0
    refused: list[Refusal] = field(default_factory=list)


def write_shards(
    documents: Iterable[Item],
    folder: str | Path,
    name: str,
    documents_per_shard: int = 1000,
) -> ShardReport:
    """Write documents as shards `folder/name-000000.tar`, …, replacing shards of that name.

    Refusals are kept in the index of the shard they would be in, so that the ledger of a training
    run knows them. A key that was seen before is refused.

    Args:
        documents: documents, and what was refused before.
        folder: on this machine, or a URL.
        name: of the shards.
        documents_per_shard: records per shard, the refused ones included.

    Raises:
        ValueError: a bad name, or no usable document at all (NothingUsable).
        OSError: the disk is full or not writable, with a path in it.
    """
    folder = _checked(folder, name, documents_per_shard)
    aside = Path(tempfile.mkdtemp(prefix=f"{name}-")) if is_remote(folder) else None
    draft = aside or folder / f".{name}.{os.getpid()}.tmp"
    with _named(folder), _made(folder):
        try:
            draft.mkdir(parents=True, exist_ok=True)
            drafts = (lambda item=item: item for item in documents)
            _write(drafts, draft, name, documents_per_shard)
            return _finish(draft, folder, name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def shard(
    read: Callable[[], Iterator[Draft]],
    identity: dict[str, Any],
    folder: str | Path,
    name: str,
    documents_per_shard: int = 1000,
    workers: int = 1,
    tell: Tell = lambda done: None,
) -> ShardReport:
    """Write a data set as shards, by several processes; what an interrupted run made is kept.

    Args:
        read: reads the data set from its beginning; picklable.
        identity: what the result depends on. Shards of an interrupted run with another are thrown
            away.
        folder, name, documents_per_shard: as `write_shards`.
        workers: processes.
        tell: called with the number of records done.

    Raises:
        ValueError: as `write_shards`, or whatever `read` raises; or another run is at it.
        OSError: as `write_shards`.
    """
    folder = _checked(folder, name, documents_per_shard)
    draft = folder / f".{name}.writing"
    if is_remote(folder):
        draft = local_folder(folder / name) / "writing"
    identity = {**identity, "name": name, "documents_per_shard": documents_per_shard}
    with _named(folder), _made(folder):
        draft.mkdir(parents=True, exist_ok=True)
        with _claimed(draft):
            _keep_only_if_same(draft, identity)
            try:
                _all_shares(read, draft, name, documents_per_shard, workers, tell)
            except BaseException:
                if not any(map(_is_whole, draft.glob("*.tar"))):
                    shutil.rmtree(draft, ignore_errors=True)
                raise
            try:
                return _finish(draft, folder, name)
            finally:
                shutil.rmtree(draft, ignore_errors=True)


def _checked(folder: str | Path, name: str, documents_per_shard: int) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"shard name {name!r}: use letters, digits, '-' and '_' only")
    if documents_per_shard < 1:
        raise ValueError(f"documents_per_shard is {documents_per_shard}; it must be at least 1")
    if str(folder).lower().startswith(("http://", "https://")):
        raise ValueError(f"{folder}: nothing can be written over http; give a folder or s3://…")
    return place(folder)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Say where a write failed that does not say it itself."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # our own
        if error.filename is None or str(error.filename).startswith(f"{folder}/."):
            error.filename = str(folder)
        raise


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Where nothing was written after all, take away the folders that were made for it."""
    made = [] if is_remote(folder) else [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what holds something stays
            for path in made:
                path.rmdir()
        raise


def identity_of(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of every file in a folder."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    facts = [(file, file.stat()) for file in files if file.exists()]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in facts]


@contextlib.contextmanager
def _claimed(draft: Path) -> Iterator[None]:
    """Keep a second run out; the system frees the lock however this one ends."""
    with (draft / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{draft.parent}: another run is writing these shards") from None
        yield


def _keep_only_if_same(draft: Path, identity: dict[str, Any]) -> None:
    """Empty the draft unless what lies there came of the same data and settings."""
    note = draft / "made-from"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    if note.is_file() and note.read_text() == digest:
        return
    for file in draft.iterdir():
        if file.name != "lock":
            file.unlink()
    note.write_text(digest)


def _write(
    drafts: Iterable[Draft],
    folder: Path,
    name: str,
    documents_per_shard: int,
    share: tuple[int, int] = (0, 1),
    done: Callable[[int], None] = lambda records: None,
) -> None:
    """Write the shards that are number `share[0]` modulo `share[1]` and not there yet."""
    writer: ShardFile | None = None
    own, of = share
    try:
        for at, make in enumerate(drafts):
            number, inside = divmod(at, documents_per_shard)
            if number % of != own:
                if writer is not None:
                    writer.close()
                    writer = None
                continue
            if inside == 0:
                if writer is not None:
                    writer.close()
                path = folder / f"{name}-{number:06d}.tar"
                writer = None if _is_whole(path) else ShardFile(path)
            if writer is not None:
                writer.take(make(), name)
            done(1)
        if writer is not None:
            writer.close()
            writer = None
    finally:
        if writer is not None:
            writer.abandon()


def _is_whole(shard: Path) -> bool:
    return shard.is_file() and index_path(shard).is_file()


def _all_shares(
    read: Callable[[], Iterator[Draft]],
    draft: Path,
    name: str,
    documents_per_shard: int,
    workers: int,
    tell: Tell,
) -> None:
    """Let every process write its share; the first error ends them all and is raised here."""
    if workers <= 1:
        total = 0

        def done(records: int) -> None:
            nonlocal total
            total += records
            tell(total)

        _write(read(), draft, name, documents_per_shard, done=done)
        return
    context = multiprocessing.get_context("spawn")
    counters = [context.Value("q", 0) for _ in range(workers)]
    results = context.SimpleQueue()
    processes: list[BaseProcess] = []
    try:
        for number, counter in enumerate(counters):
            job = (read, draft, name, documents_per_shard, (number, workers), counter, results)
            processes.append(context.Process(target=_work, args=job, daemon=True))
            processes[-1].start()
        _watch(processes, results, lambda: tell(sum(counter.value for counter in counters)))
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _watch(processes: list[BaseProcess], results: Any, tell: Callable[[], None]) -> None:
    waiting = len(processes)
    while waiting:
        while results.empty():
            tell()
            dead = [process for process in processes if process.exitcode not in (None, 0)]
            if dead and results.empty():
                raise OSError(
                    f"a process that wrote shards was ended from outside (exit status "
                    f"{dead[0].exitcode}); perhaps the memory was full. What it finished is kept: "
                    "run the same command again"
                )
            time.sleep(_POLL_SECONDS)
        error = results.get()
        if error is not None:
            raise error
        waiting -= 1
    tell()


def _work(
    read: Callable[[], Iterator[Draft]],
    draft: Path,
    name: str,
    documents_per_shard: int,
    share: tuple[int, int],
    counter: Any,
    results: Any,
) -> None:
    """What a process runs: its share of the shards, then None or the error to `results`."""
    parent = os.getppid()

    def done(records: int) -> None:
        counter.value += records
        if counter.value % _ORPHAN_CHECK == 0 and os.getppid() != parent:
            os._exit(1)

    try:
        _write(read(), draft, name, documents_per_shard, share, done)
    except Exception as error:
        results.put(error)
        return
    results.put(None)


def _finish(draft: Path, folder: Path, name: str) -> ShardReport:
    """Refuse keys that occur twice, put the shards where they belong, and count."""
    drafts = sorted(draft.glob(f"{name}-*.tar"))
    report = ShardReport()
    seen: set[str] = set()
    for path in drafts:
        arrays = _without_duplicates(path, seen)
        report.documents += len(arrays["offset"])
        report.images += len(arrays["height"])
        report.bytes += path.stat().st_size
        report.refused += read_refusals(arrays, name)
    if not report.documents:
        raise NothingUsable(folder / name, report.refused)
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _remove_old(folder, name)
    report.paths = [folder / path.name for path in drafts]
    put = upload if is_remote(folder) else os.replace
    for source, path in zip(drafts, report.paths, strict=True):
        put(source, path)
    for source, path in zip(drafts, report.paths, strict=True):
        put(index_path(source), index_path(path))
    return report


def _without_duplicates(path: Path, seen: set[str]) -> dict[str, Any]:
    """The index of a shard; a row whose key an earlier shard has is taken out and refused.

    Its bytes stay in the tar file, where nothing looks for them.
    """
    arrays = load_arrays(index_path(path))
    keys = unpack_strings(arrays, "keys")
    fresh = np.array([key not in seen for key in keys], dtype=bool)
    seen.update(keys)
    if fresh.all():
        return arrays
    images = np.repeat(fresh, arrays["image_count"])
    for column in ("offset", "size", "crc", "image_count"):
        arrays[column] = arrays[column][fresh]
    for column in ("height", "width"):
        arrays[column] = arrays[column][images]
    again = [key for key, kept in zip(keys, fresh, strict=True) if not kept]
    refused = read_refusals(arrays, "") + [Refusal("", key, DUPLICATE) for key in again]
    arrays |= pack_strings("keys", [key for key, kept in zip(keys, fresh, strict=True) if kept])
    arrays |= pack_strings("refused_keys", [item.key for item in refused])
    arrays |= pack_strings("refused_reasons", [item.reason for item in refused])
    save_arrays(index_path(path), arrays)
    return arrays


def _remove_old(folder: Path, name: str) -> None:
    """Remove shards of this name, their indexes first: what is left is then no shard."""
    files = r"-\d{6}\.(index\.npz|tokens-\w+\.npz|tar)"
    own = re.compile(rf"{name}{files}|\.{name}{files}\.[\w-]+\.tmp")
    there = folder.iterdir() if folder.is_dir() else []
    old = [path for path in there if own.fullmatch(path.name)]
    for path in sorted(old, key=lambda path: path.suffix == ".tar"):
        path.unlink()
