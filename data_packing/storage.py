"""Where bytes lie: files of this machine, and what fsspec reaches (`s3://`, `hf://`, `gs://`, …).

Everything that reads takes a place, a `Path` or a `UPath`, from `place`. Local files are read with
pread. Remote ones are read in blocks of 1 MiB that stay in a folder of this machine until it is
full; then the blocks that were not used for longest go. Several processes may share the folder:
a block is written aside and renamed, and one that was removed is fetched again.

The folder and its size belong to the machine, not to a recipe: `MLLM_CACHE` (default
`~/.cache/mllm/blocks`) and `MLLM_CACHE_GB` (default 20; 0 keeps nothing). Credentials are those of
the file system's own library (for S3: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from upath import UPath

__all__ = ["Blocks", "here", "is_remote", "local_folder", "place", "reaching", "read", "upload"]

BLOCK = 2**20
"""Bytes that are fetched and kept together."""

AHEAD = 16
"""Blocks that are fetched at once where a file is read from front to back."""

TIDY_EVERY = 256
"""Blocks that a process writes between two looks at the size of the folder."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
WEB = ("http", "https")


def place(text: str | Path, allow_http: bool = False) -> Path:
    """A path of this machine, or a UPath where the text is a URL.

    Raises:
        ValueError: `http://` without the switch, or a kind of place that fsspec does not know or
            for which a package is missing.
    """
    if not isinstance(text, str):
        return text
    found = _URL.match(text)
    if found is None:
        return Path(os.path.expanduser(text))
    kind = found[1].lower()
    if kind in WEB and not allow_http:
        raise ValueError(
            f"{text}: data over {kind}:// is off, since whoever answers there can change it at any "
            "time. Set data.allow_http: true (or --allow-http) if that is what you want"
        )
    try:
        there = UPath(text)
        there.fs  # noqa: B018 - makes the file system, so that what is missing is told now
    except ImportError as error:
        needs = {"s3": "'mllm[s3]'", "http": "aiohttp requests", "https": "aiohttp requests"}
        more = f" (pip install {needs[kind]})" if kind in needs else ""
        raise ValueError(f"{text}: {error}{more}") from error
    except ValueError as error:
        raise ValueError(f"{text}: fsspec knows no {kind}:// ({error})") from error
    return there  # type: ignore[return-value]


def here(text: str | Path) -> Path:
    """A path of this machine, where nothing else will do: what is made into shards.

    Raises:
        ValueError: the text is a URL, other than of a file.
    """
    if not isinstance(text, str):
        return text.expanduser()
    found = _URL.match(text)
    if found is None:
        return Path(text).expanduser()
    if found[1].lower() == "file":
        return Path(unquote(text[found.end() :]))
    raise ValueError(
        f"{text}: shards are made of files of this machine, not of a URL: download them (with the "
        "images that they name) and give their path. The shards themselves may lie at a URL"
    )


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turn what the libraries of remote file systems raise into an OSError with the path.

    Each has errors of its own (botocore's, aiohttp's, …), which say nothing of the file.
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        reason = f"cannot be reached ({type(error).__name__}: {error})"
        raise OSError(errno.EIO, reason, str(path)) from error


def is_remote(path: Path) -> bool:
    """Whether a place is not on this machine's file system."""
    return isinstance(path, UPath) and path.protocol not in ("", "file", "local")


def read(path: Path, offset: int, size: int, blocks: Blocks | None = None) -> bytes:
    """Read `size` bytes of a remote file from `offset`; fewer where it ends before.

    Raises:
        OSError: the file cannot be reached or read; its name is in it.
    """
    return (blocks or _shared()).read(path, offset, size)


def local_folder(path: Path) -> Path:
    """Where this machine may keep what it worked out about a remote file."""
    return _shared().folder / "beside" / hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]


def upload(source: Path, target: Path) -> None:
    """Copy a finished local file to a remote place, where it appears whole."""
    assert isinstance(target, UPath)
    with reaching(target):
        target.fs.put_file(str(source), target.path)


class Blocks:
    """Blocks of remote files, kept in a folder of bounded size.

    Args:
        folder: where they are kept.
        most: bytes that may be kept; 0 keeps none.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self._known: dict[Path, tuple[str, int]] = {}
        self._next: dict[str, int] = {}
        self._written = 0

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """As `data_packing.storage.read`."""
        name, length = self._identity(path)
        stop = min(offset + size, length)
        if stop <= offset:
            return b""
        if self.most == 0:
            return self._fetch(path, offset, stop)
        first, last = offset // BLOCK, (stop - 1) // BLOCK
        data = b"".join(self._blocks(path, name, length, first, last))
        return data[offset - first * BLOCK : stop - first * BLOCK]

    def _identity(self, path: Path) -> tuple[str, int]:
        """A name that changes when the file does, and its length."""
        if path not in self._known:
            assert isinstance(path, UPath)
            with reaching(path):
                facts: dict[str, Any] = path.fs.info(path.path)
            marks = [str(facts.get(key)) for key in ("ETag", "etag", "LastModified", "mtime")]
            text = "\n".join([str(path), str(facts["size"]), *marks])
            self._known[path] = hashlib.sha256(text.encode()).hexdigest()[:32], int(facts["size"])
        return self._known[path]

    def _blocks(self, path: Path, name: str, length: int, first: int, last: int) -> list[bytes]:
        home = self.folder / name[:2] / name
        found: dict[int, bytes] = {}
        for number in range(first, last + 1):
            file = home / str(number)
            with suppress(OSError):
                data = file.read_bytes()
                if len(data) == min(BLOCK, length - number * BLOCK):
                    found[number] = data
                    os.utime(file)
        missing = [number for number in range(first, last + 1) if number not in found]
        if missing:
            low, high = missing[0], missing[-1] + 1
            if low == self._next.get(name):
                high = max(high, min(low + AHEAD, -(-length // BLOCK)))
            self._next[name] = high
            data = self._fetch(path, low * BLOCK, min(high * BLOCK, length))
            for number in range(low, high):
                block = data[(number - low) * BLOCK : (number - low + 1) * BLOCK]
                if number not in found:
                    self._keep(home / str(number), block)
                found[number] = block
        return [found[number] for number in range(first, last + 1)]

    @staticmethod
    def _fetch(path: Path, start: int, stop: int) -> bytes:
        assert isinstance(path, UPath)
        with reaching(path):
            data: bytes = path.fs.cat_file(path.path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data)} bytes came of {stop - start}", str(path))
        return data

    def _keep(self, file: Path, data: bytes) -> None:
        draft = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(data)
            os.replace(draft, file)
        except OSError:  # a full or read-only disk costs time, nothing else
            with suppress(OSError):
                draft.unlink()
            return
        self._written += 1
        if self._written % TIDY_EVERY == 1 or self.most < TIDY_EVERY * BLOCK:
            self.tidy()

    def tidy(self) -> None:
        """Remove the blocks that were not used for longest, until nine tenths of the room are kept.

        Files that vanish meanwhile were removed by another process.
        """
        files: list[tuple[float, int, Path]] = []
        for file in self.folder.glob("??/*/*"):
            with suppress(OSError):
                facts = file.stat()
                files.append((facts.st_mtime, facts.st_size, file))
        total = sum(size for _, size, _ in files)
        if total <= self.most:
            return
        for _, size, file in sorted(files):
            if total <= 0.9 * self.most:
                return
            with suppress(OSError):
                file.unlink()
                total -= size


@cache
def _shared() -> Blocks:
    """The cache of this process, as the environment says."""
    folder = Path(os.environ.get("MLLM_CACHE", "~/.cache/mllm/blocks")).expanduser()
    text = os.environ.get("MLLM_CACHE_GB", "20")
    try:
        size = float(text)
        if not 0 <= size < 1e9:
            raise ValueError
    except ValueError:
        raise ValueError(f"MLLM_CACHE_GB is {text!r}; it must be a number of gigabytes") from None
    return Blocks(folder, int(size * 1e9))
