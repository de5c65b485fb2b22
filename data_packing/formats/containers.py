"""How a file keeps its rows, found from its first bytes and never from its name alone."""

from __future__ import annotations

import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_packing.formats.common import shown

Container = Literal["json", "jsonl", "object", "parquet", "arrow", "arrow stream", "tar"]
ROWS: tuple[Container, ...] = ("json", "jsonl", "parquet", "arrow", "arrow stream")
LINES = 1000
"""How many lines are looked at to find out what a file is."""

HEAD = 1 << 20
"""How many bytes are looked at, where lines do not matter."""

_WHOLE = 256 << 20  # a JSON object up to this size is read whole to tell it from JSON lines
_MAGIC: tuple[tuple[bytes, Container], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow stream"),
)
_OTHERS = (
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"PK\x03\x04", "a zip archive: unpack it and give the folder"),
    (b"\x80", "perhaps a pickle, which is never read: save it as JSON lines or parquet"),
    (b"\x89PNG", "an image: give the folder of images and captions"),
    (b"\xff\xd8\xff", "an image: give the folder of images and captions"),
    (b"<", "a page of HTML or XML (was a download refused?)"),
)


def container(path: Path) -> Container:
    """How a file keeps its rows.

    Raises:
        ValueError: no such file, empty, or nothing that is known; it says what was seen.
    """
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        raise ValueError(f"{path} is empty (0 bytes), not JSON or anything else")
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if _is_tar(head):
        return "tar"
    for magic, what in _OTHERS:
        if head.startswith(magic):
            raise ValueError(f"{path} is {what} (not JSON, parquet, Arrow or tar)")
    return _json_kind(path, head)


def _is_tar(head: bytes) -> bool:
    if head[257:262] == b"ustar":
        return True
    try:
        return len(head) >= tarfile.BLOCKSIZE and bool(
            tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape").name
        )
    except tarfile.TarError:
        return False


def _json_kind(path: Path, head: bytes) -> Container:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[" and not _is_lines(head):
        return "json"
    if start == b"{" and isinstance(_parsed(_lines(head)[0]), dict):
        return "jsonl"
    if start == b"{" and path.stat().st_size <= _WHOLE and _parsed(path.read_bytes()) is not None:
        return "object"
    with open(path, "rb") as file:
        if any(isinstance(_parsed(line), dict) for line in islice(file, LINES)):
            return "jsonl"
    seen = shown(head[:40].decode("utf-8-sig", "backslashreplace"))
    raise ValueError(f"{path} is not JSON, JSON lines, parquet, Arrow or tar; it starts '{seen}'")


def _is_lines(head: bytes) -> bool:
    """Whether what starts like a list is one bad line of several."""
    lines = _lines(head)
    return len(lines) > 1 and _parsed(lines[0]) is not None


def _lines(head: bytes) -> list[bytes]:
    return [line for line in head.split(b"\n") if line.strip()]


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
