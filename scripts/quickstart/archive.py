"""Read what is inside fetched packages, member by member; nothing is ever extracted by its name.

A .deb is an `ar` archive with a compressed tar in it. It is read as a stream, so that a file that
is still arriving, or only its beginning, can be read too. What was cut out of one is a plain tar.
"""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

__all__ = ["NeedsFile", "members", "safe_name", "wheel_member"]


class NeedsFile(ValueError):
    """A package that cannot be read as a stream: it is compressed in a way only dpkg-deb knows."""


_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def safe_name(name: str) -> PurePosixPath:
    """The path of a member, relative to its archive.

    Raises:
        ValueError: it points outside the archive.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"archive member {name!r} points outside its archive; refused")
    return path


def members(deb: Path | BinaryIO) -> Iterator[tuple[PurePosixPath, BinaryIO]]:
    """Yield the regular files of a package in their order: (relative path, content to read now).

    Args:
        deb: a .deb, or the plain tar that `fixture.py` cuts out of one.

    Links, devices and folders are passed over: their content is nothing we use.

    Raises:
        ValueError: the file is not a .deb, is cut short, or has a member that points outside.
    """
    name = deb.name if isinstance(deb, Path) else "the package"
    try:
        with _opened(deb) as file, _data_tar(file, deb) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    path = safe_name(member.name)
                    if member.isreg() and (content := tar.extractfile(member)) is not None:
                        yield path, cast(BinaryIO, content)
    except (tarfile.TarError, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} is damaged or incomplete: {error}") from error


def wheel_member(wheel: Path, suffix: str) -> bytes:
    """The content of the one file of a wheel whose name ends so.

    Raises:
        ValueError: the wheel is damaged, or has no such file, or several.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(suffix)]
            if len(names) != 1:
                raise ValueError(f"{wheel.name} has {len(names)} files ending in {suffix}, not 1")
            return archive.read(names[0])
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel.name} is damaged: {error}") from error


@contextmanager
def _opened(deb: Path | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(deb, Path):
        with deb.open("rb") as file:
            yield file
    else:
        yield deb


@contextmanager
def _data_tar(file: BinaryIO, deb: Path | BinaryIO) -> Iterator[BinaryIO]:
    """The uncompressed data.tar of a .deb."""
    if isinstance(deb, Path) and deb.suffix == ".tar":
        yield file
        return
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("not a Debian package (no ar header)")
    while True:
        header = file.read(_AR_HEADER)
        if len(header) < _AR_HEADER:
            raise ValueError("the Debian package ends before its data")
        name, size = header[:16].decode("ascii", "replace").strip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            break
        remaining = size + size % 2
        while remaining > 0:
            chunk = file.read(min(remaining, 1 << 20))
            if not chunk:
                raise ValueError("the Debian package ends before its data")
            remaining -= len(chunk)
    window = io.BufferedReader(_Window(file, size))
    if name == "data.tar.xz":
        with lzma.open(window) as stream:
            yield cast(BinaryIO, stream)
    elif name == "data.tar.gz":
        with gzip.open(window) as stream:
            yield cast(BinaryIO, stream)
    elif name == "data.tar":
        yield cast(BinaryIO, window)
    else:
        with _by_dpkg(name, deb) as piped:
            yield piped


@contextmanager
def _by_dpkg(name: str, deb: Path | BinaryIO) -> Iterator[BinaryIO]:
    """Other compressions (zst, in Ubuntu) through the machine's own dpkg-deb."""
    if not isinstance(deb, Path):
        raise NeedsFile(f"{name} cannot be read while it arrives")
    if shutil.which("dpkg-deb") is None:
        raise ValueError(f"{name} needs dpkg-deb to be unpacked, and this machine has none")
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield cast(BinaryIO, process.stdout)
    finally:
        process.stdout.close()
        process.wait()


class _Window(io.RawIOBase):
    """The next `size` bytes of a file, as a file of its own that only reads forward."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        data = self._file.read(min(len(view), self._left))
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)
