"""One shard as it is written: documents into a tar file, their numbers into its index."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_packing.document import Document, Image, Text
from data_packing.files import TAR_BLOCK, pack_strings, partial_path, save_arrays
from data_packing.ledger import Refusal
from data_packing.shards import VERSION, index_path, padded

DUPLICATE = "duplicate key: an earlier document has the same one"
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


class _Hashing(io.RawIOBase):
    """Passes writes on and keeps their SHA-256 and position, and a CRC that may be begun anew."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.position = self.crc = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.crc = zlib.crc32(data, self.crc)
        self.position += len(data)
        return len(data)


class ShardFile:
    """A shard being written; it appears under its name with `close`, its index after it.

    Args:
        path: where the tar file will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.file = open(self.partial, "wb")  # noqa: SIM115 - closed by close() or abandon()
        self.out = _Hashing(self.file)
        self.refused: list[Refusal] = []
        self.keys: list[str] = []
        self.offset: list[int] = []
        self.size: list[int] = []
        self.crc: list[int] = []
        self.images: list[list[tuple[int, int]]] = []
        self._seen: set[str] = set()

    def take(self, item: Document | Refusal, source: str) -> None:
        """Add a document, or note why there is none.

        Args:
            source: the name of the data set where the document does not say it.
        """
        refusal = item if isinstance(item, Refusal) else _fault(item, source, self._seen)
        if refusal is not None:
            self.refused.append(refusal)
        else:
            assert isinstance(item, Document)
            self._seen.add(item.key)
            self._add(item)

    def _add(self, document: Document) -> None:
        start, member = self.out.position, _member_name(document.key)
        self.out.crc = 0
        entries: list[dict[str, Any]] = []
        files: list[tuple[str, bytes]] = []
        for part in document.parts:
            if isinstance(part, Text):
                entries.append(_text_entry(part))
                continue
            known = (extension for magic, extension in _EXTENSIONS if part.data.startswith(magic))
            file_name = f"{len(files)}.{next(known, 'img')}"
            files.append((file_name, part.data))
            entries.append(_image_entry(part, file_name))
        record = {"key": document.key, "source": document.source, "parts": entries}
        self._member(f"{member}.json", json.dumps(record).encode())
        for file_name, data in files:
            self._member(f"{member}.{file_name}", data)
        self.keys.append(document.key)
        self.offset.append(start)
        self.size.append(self.out.position - start)
        self.crc.append(self.out.crc)
        self.images.append([(image.height, image.width) for image in document.images])

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self.out.write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
        self.out.write(data)
        self.out.write(bytes(padded(len(data)) - len(data)))

    def close(self) -> None:
        """Finish the tar file, and after it the index."""
        self.out.write(bytes(2 * TAR_BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)
        sizes = np.array([hw for images in self.images for hw in images], dtype=np.int32)
        sizes = sizes.reshape(-1, 2)
        arrays: dict[str, Any] = {
            "version": VERSION,
            "tar_size": self.out.position,
            "sha256": np.frombuffer(self.out.digest.digest(), dtype=np.uint8),
            "offset": np.array(self.offset, dtype=np.int64),
            "size": np.array(self.size, dtype=np.int64),
            "crc": np.array(self.crc, dtype=np.uint32),
            "image_count": np.array([len(images) for images in self.images], dtype=np.int32),
            "height": sizes[:, 0],
            "width": sizes[:, 1],
            **pack_strings("keys", self.keys),
            **pack_strings("refused_keys", [item.key for item in self.refused]),
            **pack_strings("refused_reasons", [item.reason for item in self.refused]),
        }
        save_arrays(index_path(self.path), arrays)

    def abandon(self) -> None:
        """Remove what was written; a full disk, which closing meets again, is told already."""
        try:
            with contextlib.suppress(OSError):
                self.file.close()
        finally:
            self.partial.unlink(missing_ok=True)


def _fault(document: Document, source: str, seen: set[str]) -> Refusal | None:
    source = document.source or source
    if not document.key:
        return Refusal(source, "?", "the document has no key")
    if document.key in seen:
        return Refusal(source, document.key, DUPLICATE)
    if not document.parts:
        return Refusal(source, document.key, "the document is empty")
    try:
        for part in document.parts:
            if isinstance(part, Text):
                for words in (part.text, *chain.from_iterable(part.variants)):
                    words.encode("utf-8")
        document.key.encode("utf-8")
    except UnicodeEncodeError:
        return Refusal(source, repr(document.key)[1:-1], "text holds half a character (surrogate)")
    return None


def _text_entry(text: Text) -> dict[str, Any]:
    entry: dict[str, Any] = {"text": text.text, "role": text.role, "learned": text.learned}
    if text.variants:  # left out where there are none, so that such shards keep their bytes
        entry["variants"] = dict(text.variants)
    if text.box is not None:
        entry["box"] = text.box
    return entry


def _image_entry(image: Image, file_name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "image": file_name,
        "height": image.height,
        "width": image.width,
        "role": image.role,
    }
    if image.clip:
        entry["clip"] = image.clip
    return entry


def _member_name(key: str) -> str:
    """A name that is safe in any tar, has no dot, and differs for different keys."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", key)[:60]
    if plain == key:
        return key
    return f"{plain}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
