"""The members of a tar file, one after another. Nothing is ever written to disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2048 * _BLOCK
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, IndexError, KeyError)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar.

    Attributes:
        name: its name there.
        data: its bytes; empty when `fault` says why they are not used.
        fault: why it is refused.
    """

    name: str
    data: bytes = b""
    fault: str = ""


def members(path: Path) -> Iterator[Member]:
    """Read the files of a tar in order, folders left out.

    Reading goes on behind the zeros that end a tar: another one may follow (`cat a.tar b.tar`), and
    a damaged block may be zeros. Where the tar is cut short or damaged, the last member says so;
    those before it are whole.
    """
    start: int | None = 0
    end = 0
    with open(path, "rb") as file:
        try:
            while start is not None:
                end = start
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    while (info := archive.next()) is not None:
                        archive.members = []  # type: ignore[attr-defined] # or it keeps them all
                        member = _read(archive, info)
                        end = archive.offset
                        if member is not None:
                            yield member
                start = _behind_zeros(file, end)
        except _DAMAGE as error:
            reason = f"the tar is cut short or damaged: {error}; nothing behind is read"
            yield Member(f"byte {end}", fault=reason)


def unsafe(name: str) -> str:
    """Why the name of a member is refused, or an empty text."""
    pieces = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or pieces[0].endswith(":"):
        return "an absolute path in the tar"
    return "a path with '..' in the tar" if ".." in pieces else ""


def _read(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member | None:
    if info.isdir():
        return None
    fault = unsafe(info.name)
    if not info.isreg() or info.issparse():
        what = "a sparse file" if info.issparse() else _KINDS.get(info.type, "no plain file")
        fault = fault or f"{what} in the tar"
    if fault:
        return Member(info.name, fault=fault)
    content = archive.extractfile(info)
    data = content.read() if content else b""
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name} has {len(data):,} of {info.size:,} bytes")
    return Member(info.name, data)


def _behind_zeros(file: BinaryIO, at: int) -> int | None:
    """The first block behind the zeros at a place that is not zeros; None where the file ends.

    Raises:
        ReadError: there is no block of zeros.
    """
    file.seek(at)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        raise tarfile.ReadError("no member and no end mark stands here")
    while chunk := file.read(_CHUNK):
        if any(chunk):
            first = len(chunk) - len(chunk.lstrip(b"\0"))
            return file.tell() - len(chunk) + first // _BLOCK * _BLOCK
    return None
