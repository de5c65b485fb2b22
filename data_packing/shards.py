"""Documents on disk: plain tar files that WebDataset reads, beside each a small index.

`name-000000.tar` holds, for every document, `<member>.json` (its parts in order) and its images as
`<member>.0.png`, `<member>.1.jpg`, … . `name-000000.index.npz` holds numbers: where each document
lies, how large its images are. The indexes appear last, all together: a tar without its index is
not a shard, so an interrupted writing is never taken for a whole one.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from upath import UPath

from data_packing.document import Document, DocumentError, Image, Part, Text
from data_packing.files import (
    TAR_BLOCK,
    OpenFiles,
    load_arrays,
    tar_member,
    unpack_strings,
)
from data_packing.ledger import Refusal
from data_packing.storage import WEB, place, reaching

VERSION = 2


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.npz")


def read_index(shard: str | Path) -> dict[str, NDArray[Any]]:
    """Read the index of a shard and check it against the tar file.

    Returns:
        As `load_index`.

    Raises:
        ValueError: the shard or its index is missing, damaged, or they disagree.
    """
    shard = place(shard)
    arrays = load_index(shard)
    actual, tar_size = shard.stat().st_size, int(arrays["tar_size"])
    if actual != tar_size:
        raise ValueError(
            f"{shard} has {actual:,} bytes, its index says {tar_size:,}: the file is "
            f"{'truncated' if actual < tar_size else 'another one'}. Write the shards again"
        )
    return arrays


def load_index(shard: str | Path) -> dict[str, NDArray[Any]]:
    """Read the index of a shard, whatever has become of the tar file.

    Returns:
        offset, size int64 [N] and crc uint32 [N] (CRC-32) of each document's bytes; image_count
        int32 [N]; height, width int32 [I];
        keys and refused_* as `pack_strings` stores them; tar_size, sha256.

    Raises:
        ValueError: the shard or its index is missing, or the index is damaged.
    """
    shard = place(shard)
    if not shard.is_file():
        raise ValueError(f"no shard at {shard}")
    try:
        arrays = load_arrays(index_path(shard))
    except FileNotFoundError:
        raise ValueError(
            f"{shard} has no index beside it ({index_path(shard).name}): its writing was "
            "interrupted, or it is not a shard of this project. Write the shards again"
        ) from None
    expected = [
        "version",
        "offset",
        "size",
        "crc",
        "image_count",
        "height",
        "width",
        "keys",
        "tar_size",
        "sha256",
    ]
    missing = [field for field in expected if field not in arrays]
    if missing or int(arrays["version"]) != VERSION:
        raise ValueError(
            f"{index_path(shard)} is not an index of version {VERSION}"
            f"{' (lacks ' + ', '.join(missing) + ')' if missing else ''}. Write the shards again"
        )
    return arrays


def read_document(shard: str | Path, number: int) -> Document:
    """Read document `number` (from 0) of a shard. For many, use `Index.read`.

    Raises:
        IndexError: no such document.
        DocumentError: its bytes are damaged.
        ValueError: as `read_index`.
    """
    arrays = read_index(shard)
    if not 0 <= number < len(arrays["offset"]):
        raise IndexError(f"document {number} of {shard}, which has {len(arrays['offset'])}")
    with OpenFiles() as files:
        span = files.read(place(shard), int(arrays["offset"][number]), int(arrays["size"][number]))
    return parse_span(span, int(arrays["crc"][number]))


def parse_span(span: bytes, crc: int | None = None, text: str | None = None) -> Document:
    """Make a document from the bytes of its members in the tar file.

    Nothing is written to disk, and only members of the document itself are looked at.

    Args:
        crc: of the bytes when they were indexed; without it they are taken as they are.
        text: the text variant to take, None for the document as it was written.

    Raises:
        DocumentError: the bytes are damaged, not those that were indexed, or without the variant.
    """
    if crc is not None and zlib.crc32(span) != crc:
        raise DocumentError("not the bytes that were indexed: the shard changed or is damaged")
    members: dict[str, bytes] = {}
    at = 0
    try:
        while at < len(span):
            name, size = tar_member(span[at : at + TAR_BLOCK])
            at += TAR_BLOCK
            data = span[at : at + size]
            if len(data) != size:
                raise DocumentError(f"damaged shard: member {name!r} is cut short")
            members[name.split(".", 1)[1]] = data
            at += padded(size)
        record = json.loads(members["json"])
        parts = tuple(_part(entry, members) for entry in record["parts"])
        document = Document(parts, record["source"], record["key"])
    except DocumentError:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DocumentError(f"damaged shard: {type(error).__name__}: {error}") from error
    return document if text is None else document.with_variant(text)


def expand(pattern: str | Path, allow_http: bool = False) -> list[Path]:
    """Find shards: a file, a folder, a glob, `{000..009}` ranges and `{a,b}` choices.

    A pattern may be a URL that fsspec reads (`s3://bucket/{000..099}.tar`); over http there is no
    glob, and http itself needs `allow_http`.

    Raises:
        ValueError: nothing matches, one of the files named outright is missing, or as `place`.
    """
    found: set[Path] = set()
    missing = []
    for candidate in _braces(str(pattern)):
        matches = _matches(place(candidate, allow_http))
        if not matches:
            missing.append(candidate)
        found.update(matches)
    if missing and (not found or any(not has_magic(path) for path in missing)):
        more = f" (and {len(missing) - 3} more)" if len(missing) > 3 else ""
        where = "" if "://" in str(pattern) else f"; looked from {os.getcwd()}"
        raise ValueError(
            f"no shard matches {', '.join(missing[:3])}{more}{where}. "
            + (_below(missing) or "Is the path right, and was the data prepared?")
        )
    return sorted(found)


def _below(folders: Sequence[str]) -> str:
    """What to give instead of a folder whose shards lie in folders of it; empty if none do."""
    for folder in folders:
        if "://" not in folder and any(Path(folder).glob("*/*.tar")):
            return f"Shards lie in folders of it: give '{folder.rstrip('/')}/*/*.tar'"
    return ""


def _matches(candidate: Path) -> list[Path]:
    """The files that a path, a folder or a glob stands for."""
    if isinstance(candidate, UPath):
        with reaching(candidate):
            return _remote_matches(candidate)
    text = str(candidate)
    if os.path.isdir(text):
        text = os.path.join(text, "*.tar")
    matches = glob(text) if has_magic(text) else [text]
    return [Path(match) for match in matches if os.path.isfile(match)]


def _remote_matches(candidate: UPath) -> list[Path]:
    text = str(candidate)
    if not has_magic(text):
        try:
            found = candidate.fs.info(candidate.path)
        except FileNotFoundError as error:
            if error.__cause__ is not None and "404" not in str(error.__cause__):
                raise error.__cause__ from None  # http: forbidden, not missing
            return []
        if found["type"] == "file":
            return [candidate]  # type: ignore[list-item]
        text = f"{text.rstrip('/')}/*.tar"
    if candidate.protocol in WEB:
        raise ValueError(f"{text}: files cannot be listed over http; name them, or use {{a..b}}")
    names = candidate.fs.glob(text)
    return [place(candidate.fs.unstrip_protocol(name)) for name in names]


def _braces(pattern: str) -> list[str]:
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for number, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", piece) if number % 2 else None
        if span:
            low, high, width = int(span[1]), int(span[2]), len(span[1])
            if high < low:
                raise ValueError(f"{{{piece}}} in {pattern} counts down; write the lower one first")
            choices.append([f"{value:0{width}d}" for value in range(low, high + 1)])
        else:
            choices.append(piece.split(",") if number % 2 else [piece])
    return ["".join(choice) for choice in product(*choices)]


def _part(entry: dict[str, Any], members: dict[str, bytes]) -> Part:
    role = entry["role"]
    if "image" in entry:
        height, width = int(entry["height"]), int(entry["width"])
        return Image(members[entry["image"]], height, width, role, int(entry.get("clip", 0)))
    variants = tuple(dict(entry.get("variants", ())).items())
    box = None
    if "box" in entry:
        left, top, right, bottom = map(float, entry["box"])
        box = left, top, right, bottom
    return Text(entry["text"], role, bool(entry["learned"]), variants, box)


def padded(size: int) -> int:
    """A size rounded up to whole blocks of a tar."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def read_refusals(arrays: dict[str, NDArray[Any]], source: str) -> list[Refusal]:
    """The records that were refused when the shard of this index was written."""
    keys = unpack_strings(arrays, "refused_keys")
    reasons = unpack_strings(arrays, "refused_reasons")
    return [Refusal(source, key, reason) for key, reason in zip(keys, reasons, strict=True)]
