"""Small tools for files: atomic writing, NumPy archives without pickle, text in arrays."""

from __future__ import annotations

import errno
import io
import os
import secrets
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from data_packing import storage
from data_packing.storage import is_remote

_FULL = "make room there and run the same command again"
_RIGHTS = "choose a place that you may read and write, or change its rights"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "the limit on the size of a file is too low there; raise it (ulimit -f)",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOENT: "check the path: it is not there, or cannot be made there",
    errno.ENOTDIR: "a part of this path is a file; give a path below a folder",
    errno.EISDIR: "this is a folder; give a file",
    errno.EEXIST: "something else lies there; give another path",
}


def explain(error: OSError) -> str:
    """What the system refused, where, and what to do, for people."""
    if error.errno is None:
        return str(error) or type(error).__name__
    path = f"{error.filename}: " if error.filename is not None else ""
    remedy = _REMEDIES.get(error.errno, "check that this place can be read and written")
    return f"{path}{(error.strerror or str(error)).lower()}; {remedy}"


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is complete on disk."""
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def partial_path(path: Path) -> Path:
    """A hidden name beside `path` for what is not finished, of this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write named arrays to an .npz file, atomically."""
    with atomic(path) as file:
        np.savez(file, **arrays)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read an .npz file; nothing in it is unpickled.

    Raises:
        ValueError: not such a file, damaged, or holding Python objects.
    """
    try:
        source: Any = io.BytesIO(path.read_bytes()) if is_remote(path) else path
        with np.load(source, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is damaged or not an array file: {error}") from error


def pack_strings(name: str, strings: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Store texts as UTF-8 bytes and where each ends, under `name` and `name_ends`."""
    encoded = [text.encode("utf-8") for text in strings]
    return {
        name: np.frombuffer(b"".join(encoded), dtype=np.uint8),
        f"{name}_ends": np.cumsum([len(text) for text in encoded], dtype=np.int64),
    }


def unpack_strings(arrays: dict[str, NDArray[Any]], name: str) -> list[str]:
    """Read back what `pack_strings` stored."""
    data, ends = arrays[name].tobytes(), arrays[f"{name}_ends"].tolist()
    starts = [0, *ends][: len(ends)]
    return [data[start:end].decode("utf-8") for start, end in zip(starts, ends, strict=True)]


TAR_BLOCK = 512


def tar_member(header: bytes) -> tuple[str, int]:
    """Name and size of a plain file from its header in a tar file, faster than `tarfile`.

    Raises:
        ValueError: it is something else, or damaged.
    """
    field = header[148:156]
    if len(header) != TAR_BLOCK or sum(header) - sum(field) + 8 * 32 != int(
        field.rstrip(b"\0 "), 8
    ):
        raise ValueError("wrong checksum of a header")
    if header[156:157] not in (b"0", b"\0") or header[345:346] != b"\0":
        raise ValueError("a member that is no plain file")
    return header[:100].rstrip(b"\0").decode("utf-8"), int(header[124:136].rstrip(b"\0 "), 8)


@dataclass(slots=True)
class _OpenFile:
    handle: int
    readers: int = 0


class OpenFiles:
    """Files kept open for reading at any place, by any number of threads.

    The oldest that nobody reads from is closed when there are many.
    """

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._open: dict[Path, _OpenFile] = {}
        self._lock = Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`; fewer where the file ends before."""
        if is_remote(path):
            return storage.read(path, offset, size)
        file = self._take(path)
        try:
            return os.pread(file.handle, size, offset)
        finally:
            with self._lock:
                file.readers -= 1

    def close(self) -> None:
        """Close them all; reading opens them again."""
        with self._lock:
            for file in self._open.values():
                os.close(file.handle)
            self._open.clear()

    def _take(self, path: Path) -> _OpenFile:
        with self._lock:
            if path in self._open:
                self._open[path].readers += 1
                return self._open[path]
        handle = os.open(path, os.O_RDONLY)  # slow on some disks: others may read meanwhile
        with self._lock:
            if path in self._open:
                os.close(handle)
            else:
                idle = [old for old, file in self._open.items() if not file.readers]
                for old in idle[: max(0, len(self._open) + 1 - self.most)]:
                    os.close(self._open.pop(old).handle)
                self._open[path] = _OpenFile(handle)
            self._open[path].readers += 1
            return self._open[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["most"])  # type: ignore[misc]
