"""Documents on disk: plain tar files that WebDataset reads, beside each a small index.

`name-000000.tar` holds, for every document, `<member>.json` (its parts in order) and its images as
`<member>.0.png`, `<member>.1.jpg`, … . `name-000000.index.npz` holds numbers: where each document
lies, how large its images are. The indexes appear last, all together: a tar without its index is
not a shard, so an interrupted writing is never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_packing.document import Document, DocumentError, Image, Part, Text
from data_packing.files import (
    TAR_BLOCK,
    load_arrays,
    pack_strings,
    partial_path,
    save_arrays,
    sync_folder,
    tar_member,
    unpack_strings,
)
from data_packing.ledger import Refusal

VERSION = 1

_EXTENSIONS = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8", "jpg"),
    (b"GIF8", "gif"),
    (b"RIFF", "webp"),
    (b"BM", "bmp"),
    (b"II", "tif"),
    (b"MM", "tif"),
    (b"P", "ppm"),
)


@dataclass(slots=True)
class ShardReport:
    """What `write_shards` wrote, and what it was given that cannot be used."""

    paths: list[Path] = field(default_factory=list)
    documents: int = 0
    images: int = 0
    bytes: int = 0
    refused: list[Refusal] = field(default_factory=list)


def write_shards(
    documents: Iterable[Document | Refusal],
    folder: str | Path,
    name: str,
    documents_per_shard: int = 1000,
) -> ShardReport:
    """Write documents as shards `folder/name-000000.tar`, …, replacing shards of that name.

    The old ones stay until the new ones are whole.

    Refusals are kept in the index of the shard that was open when they came, so that the ledger of
    a training run knows them. A key that was seen before is refused.

    Raises:
        ValueError: a bad name, or no usable document at all.
        OSError: the disk is full or not writable, with a path in it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"shard name {name!r}: use letters, digits, '-' and '_' only")
    if documents_per_shard < 1:
        raise ValueError(f"documents_per_shard is {documents_per_shard}; it must be at least 1")
    folder = Path(folder)
    draft = folder / f".{name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.mkdir(exist_ok=True)
        report = _write(documents, draft, name, documents_per_shard)
        _replace(report, folder, name)
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)  # a failed write does not say where
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report


def _replace(report: ShardReport, folder: Path, name: str) -> None:
    """Put whole new shards where the old ones are; indexes last, so that none is half there."""
    drafts = list(report.paths)
    _remove_old(folder, name)
    report.paths[:] = [folder / path.name for path in drafts]
    for draft, path in zip(drafts, report.paths, strict=True):
        os.replace(draft, path)
    for draft, path in zip(drafts, report.paths, strict=True):
        os.replace(index_path(draft), index_path(path))


def _write(
    documents: Iterable[Document | Refusal], folder: Path, name: str, documents_per_shard: int
) -> ShardReport:
    """The shards, then their indexes."""
    report = ShardReport()
    writer: _ShardWriter | None = None
    pending: list[tuple[Path, dict[str, Any]]] = []
    seen: set[str] = set()
    waiting: list[Refusal] = []
    try:
        for item in documents:
            refusal = item if isinstance(item, Refusal) else _fault(item, name, seen)
            if refusal is not None:
                report.refused.append(refusal)
                (writer.refused if writer else waiting).append(refusal)
                continue
            assert isinstance(item, Document)
            if writer is not None and len(writer.keys) == documents_per_shard:
                pending.append(writer.close())
                writer = None
            if writer is None:
                writer = _ShardWriter(folder / f"{name}-{len(pending):06d}.tar", waiting)
                waiting = []
            seen.add(item.key)
            writer.add(item)
            report.documents += 1
            report.images += len(item.images)
        if writer is None:
            reasons = "".join(f"\n  {item.key}: {item.reason}" for item in report.refused[:5])
            raise ValueError(f"no usable document for the shards {folder / name}{reasons}")
        pending.append(writer.close())
        writer = None
    finally:
        if writer is not None:
            writer.abandon()
    for path, arrays in pending:
        save_arrays(index_path(path), arrays)
        report.paths.append(path)
        report.bytes += path.stat().st_size
    return report


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.npz")


def read_index(shard: str | Path) -> dict[str, NDArray[Any]]:
    """Read the index of a shard and check it against the tar file.

    Returns:
        offset, size int64 [N] of each document; image_count int32 [N]; height, width int32 [I];
        keys and refused_* as `pack_strings` stores them; tar_size, sha256.

    Raises:
        ValueError: the shard or its index is missing, damaged, or they disagree.
    """
    shard = Path(shard)
    if not shard.is_file():
        raise ValueError(f"no shard at {shard}")
    try:
        arrays = load_arrays(index_path(shard))
    except FileNotFoundError:
        raise ValueError(
            f"{shard} has no index beside it ({index_path(shard).name}): its writing was "
            "interrupted, or it is not a shard of this project. Write the shards again"
        ) from None
    expected = ("version", "offset", "size", "image_count", "height", "width", "keys", "tar_size")
    missing = [field for field in expected if field not in arrays]
    if missing or int(arrays["version"]) != VERSION:
        raise ValueError(
            f"{index_path(shard)} is not an index of version {VERSION}"
            f"{' (lacks ' + ', '.join(missing) + ')' if missing else ''}. Write the shards again"
        )
    actual, tar_size = shard.stat().st_size, int(arrays["tar_size"])
    if actual != tar_size:
        raise ValueError(
            f"{shard} has {actual:,} bytes, its index says {tar_size:,}: the file is "
            f"{'truncated' if actual < tar_size else 'another one'}. Write the shards again"
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
    with open(shard, "rb") as file:
        span = os.pread(file.fileno(), int(arrays["size"][number]), int(arrays["offset"][number]))
    return parse_span(span)


def parse_span(span: bytes) -> Document:
    """Make a document from the bytes of its members in the tar file.

    Nothing is written to disk, and only members of the document itself are looked at.

    Raises:
        DocumentError: the bytes are damaged.
    """
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
            at += _padded(size)
        record = json.loads(members["json"])
        parts = tuple(_part(entry, members) for entry in record["parts"])
        return Document(parts, record["source"], record["key"])
    except DocumentError:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DocumentError(f"damaged shard: {type(error).__name__}: {error}") from error


def expand(pattern: str | Path) -> list[Path]:
    """Find shards: a file, a folder, a glob, `{000..009}` ranges and `{a,b}` choices.

    Raises:
        ValueError: nothing matches, or one of the files named outright is missing.
    """
    pattern = os.path.expanduser(str(pattern))
    found: set[Path] = set()
    missing = []
    for candidate in _braces(pattern):
        if os.path.isdir(candidate):
            candidate = os.path.join(candidate, "*.tar")
        matches = glob(candidate) if has_magic(candidate) else [candidate]
        matches = [match for match in matches if os.path.isfile(match)]
        if not matches:
            missing.append(candidate)
        found.update(map(Path, matches))
    if missing and (not found or any(not has_magic(path) for path in missing)):
        more = f" (and {len(missing) - 3} more)" if len(missing) > 3 else ""
        raise ValueError(
            f"no shard matches {', '.join(missing[:3])}{more}; looked from {os.getcwd()}. "
            "Is the path right, and was the data prepared?"
        )
    return sorted(found)


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
        return Image(members[entry["image"]], int(entry["height"]), int(entry["width"]), role)
    return Text(entry["text"], role, bool(entry["learned"]))


def _fault(document: Document, name: str, seen: set[str]) -> Refusal | None:
    source = document.source or name
    if not document.key:
        return Refusal(source, "?", "the document has no key")
    if document.key in seen:
        return Refusal(source, document.key, "duplicate key: an earlier document has the same one")
    if not document.parts:
        return Refusal(source, document.key, "the document is empty")
    try:
        for part in document.parts:
            if isinstance(part, Text):
                part.text.encode("utf-8")
        document.key.encode("utf-8")
    except UnicodeEncodeError:
        return Refusal(source, repr(document.key)[1:-1], "text holds half a character (surrogate)")
    return None


def _remove_old(folder: Path, name: str) -> None:
    """Remove shards of this name, their indexes first: what is left is then no shard."""
    files = r"-\d{6}\.(index\.npz|tokens-\w+\.npz|tar)"
    own = re.compile(rf"{name}{files}|\.{name}{files}\.[\w-]+\.tmp")
    old = [path for path in folder.iterdir() if own.fullmatch(path.name)]
    for path in sorted(old, key=lambda path: path.suffix == ".tar"):
        path.unlink()


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _member_name(key: str) -> str:
    """A name that is safe in any tar, has no dot, and differs for different keys."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", key)[:60]
    if plain == key:
        return key
    return f"{plain}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


class _Hashing(io.RawIOBase):
    """Passes writes on and keeps their SHA-256 and position."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)
        return len(data)


class _ShardWriter:
    def __init__(self, path: Path, refused: list[Refusal]) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.file = open(self.partial, "wb")  # noqa: SIM115 - closed by close() or abandon()
        self.out = _Hashing(self.file)
        self.refused = refused
        self.keys: list[str] = []
        self.offset: list[int] = []
        self.size: list[int] = []
        self.images: list[list[tuple[int, int]]] = []

    def add(self, document: Document) -> None:
        start, member = self.out.position, _member_name(document.key)
        entries: list[dict[str, Any]] = []
        files: list[tuple[str, bytes]] = []
        for part in document.parts:
            if isinstance(part, Text):
                entries.append({"text": part.text, "role": part.role, "learned": part.learned})
                continue
            known = (extension for magic, extension in _EXTENSIONS if part.data.startswith(magic))
            file_name = f"{len(files)}.{next(known, 'img')}"
            files.append((file_name, part.data))
            entries.append(
                {
                    "image": file_name,
                    "height": part.height,
                    "width": part.width,
                    "role": part.role,
                }
            )
        record = {"key": document.key, "source": document.source, "parts": entries}
        self._member(f"{member}.json", json.dumps(record).encode())
        for file_name, data in files:
            self._member(f"{member}.{file_name}", data)
        self.keys.append(document.key)
        self.offset.append(start)
        self.size.append(self.out.position - start)
        self.images.append([(image.height, image.width) for image in document.images])

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self.out.write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
        self.out.write(data)
        self.out.write(bytes(_padded(len(data)) - len(data)))

    def close(self) -> tuple[Path, dict[str, Any]]:
        """Finish the tar file and return the arrays of its index, which the caller writes."""
        self.out.write(bytes(2 * TAR_BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)
        sync_folder(self.path.parent)
        sizes = np.array([hw for images in self.images for hw in images], dtype=np.int32)
        sizes = sizes.reshape(-1, 2)
        return self.path, {
            "version": VERSION,
            "tar_size": self.out.position,
            "sha256": np.frombuffer(self.out.digest.digest(), dtype=np.uint8),
            "offset": np.array(self.offset, dtype=np.int64),
            "size": np.array(self.size, dtype=np.int64),
            "image_count": np.array([len(images) for images in self.images], dtype=np.int32),
            "height": sizes[:, 0],
            "width": sizes[:, 1],
            **pack_strings("keys", self.keys),
            **pack_strings("refused_keys", [item.key for item in self.refused]),
            **pack_strings("refused_reasons", [item.reason for item in self.refused]),
        }

    def abandon(self) -> None:
        """Remove what was written; a full disk, which closing meets again, is told already."""
        try:
            with contextlib.suppress(OSError):
                self.file.close()
        finally:
            self.partial.unlink(missing_ok=True)


def read_refusals(arrays: dict[str, NDArray[Any]], source: str) -> list[Refusal]:
    """The records that were refused when the shard of this index was written."""
    keys = unpack_strings(arrays, "refused_keys")
    reasons = unpack_strings(arrays, "refused_reasons")
    return [Refusal(source, key, reason) for key, reason in zip(keys, reasons, strict=True)]
