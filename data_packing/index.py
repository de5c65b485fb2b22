"""The numbers of one source: where each document lies, and what it costs. No text, no pixels."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_packing.costing import checked_cost
from data_packing.document import Document, DocumentError
from data_packing.executors import HERE, Executor
from data_packing.files import OpenFiles, load_arrays, pack_strings, save_arrays, unpack_strings
from data_packing.ledger import Refusal
from data_packing.sample import Cost
from data_packing.shards import load_index, parse_span, read_index, read_refusals
from data_packing.storage import is_remote, local_folder, place

_Arrays = dict[str, NDArray[Any]]
_READS = 32  # at a time, where each takes long


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document lies: its shard, its row there, its bytes and their CRC-32.

    `text` is the variant of its text that the source takes.
    """

    path: Path
    row: int
    offset: int
    size: int
    crc: int
    text: str | None = None

    def key(self) -> str:
        """The key of the document, from the shard's index; its row where that is another one."""
        with suppress(ValueError, IndexError, OSError):
            index = load_index(self.path)
            if int(index["crc"][self.row]) == self.crc:
                return unpack_strings(index, "keys")[self.row]
        return f"{self.path.name}, document {self.row}"


@dataclass(slots=True)
class Index:
    """One source as numbers. N documents, P pieces, I images; ragged by `*_start` offsets.

    Attributes:
        name: the source's name, from its shards.
        paths: its shards.
        shard int32 [N], offset, size int64 [N]: where a document's bytes are.
        crc uint32 [N]: CRC-32 of these bytes when they were written.
        overhead int32 [N]: text tokens that every slice pays.
        piece_start int64 [N+1]: a document's pieces; none where the document is refused.
        piece_text int32 [P]: text tokens of a piece.
        piece_image_start int64 [P+1]: a piece's images.
        height, width int32 [I]: of the images that pieces refer to.
        refused: documents that are in no piece: bad records, and what `cost` refused.
        refused_documents: how many of the N are among them.
        fingerprint: hash of everything above and of the shards' bytes.
        text: the text variant that is counted and read, None for the documents as written.
    """

    name: str
    paths: list[Path]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc: NDArray[np.uint32]
    overhead: NDArray[np.int32]
    piece_start: NDArray[np.int64]
    piece_text: NDArray[np.int32]
    piece_image_start: NDArray[np.int64]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    refused: list[Refusal]
    refused_documents: int
    fingerprint: str
    _shard_start: NDArray[np.int64]
    _files: OpenFiles
    text: str | None = None
    _keys: tuple[Path, list[str]] | None = None

    def __len__(self) -> int:
        """The number of documents in the shards, the refused ones included."""
        return len(self.offset)

    @property
    def records(self) -> int:
        """The number of records that sharding read: documents, and what never became one."""
        return len(self) + len(self.refused) - self.refused_documents

    def place(self, number: int) -> Place:
        """Where a document lies."""
        shard = int(self.shard[number])
        row = number - int(self._shard_start[shard])
        offset, size = int(self.offset[number]), int(self.size[number])
        return Place(self.paths[shard], row, offset, size, int(self.crc[number]), self.text)

    def read(self, number: int) -> Document:
        """Read one document by its number, with the text that was counted.

        Raises:
            DocumentError: its bytes are damaged, or it lacks the text variant.
            OSError: the shard cannot be read.
        """
        place = self.place(number)
        span = self._files.read(place.path, place.offset, place.size)
        return parse_span(span, place.crc, place.text)

    def key(self, number: int) -> str:
        """The key of a document, without reading the document."""
        place = self.place(number)
        if self._keys is None or self._keys[0] != place.path:
            self._keys = place.path, unpack_strings(read_index(place.path), "keys")
        return self._keys[1][place.row]

    def close(self) -> None:
        """Close the shards that were opened for reading."""
        self._files.close()


def build_index(
    paths: Sequence[str | Path],
    cost: Callable[[Document], Cost],
    fingerprint: str,
    executor: Executor = HERE,
    name: str | None = None,
    text: str | None = None,
    *,
    begin: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[int], None] = lambda missing: None,
) -> Index:
    """Index the shards of one source; token counts are cached beside each shard.

    Args:
        paths: the shards, in the order that fixes document numbers (`expand` sorts them).
        cost: what a document costs; raises DocumentError to refuse it. Picklable.
        fingerprint: names what `cost` depends on (tokenizer, template); the cache is kept by it.
        executor: who counts tokens; several processes or machines share out the shards.
        name: of the source, in the ledger; from the first shard's file name (and the variant) when
            left out.
        text: the variant of the texts to use; documents without it are refused. None uses the
            texts as written.
        begin: where to begin counting, from 0 (the first shard) to 1. Processes that share a disk
            and begin at different places find what the others have counted, and so share the work.
        stop: asked after each shard whether to give up.
        tell: told how many shards have to be counted, if any.

    Raises:
        ValueError: a shard is missing, unfinished or damaged; the message says which and why.
        InterruptedError: it was told to stop.
    """
    shards = [place(path) for path in paths]
    if not shards:
        raise ValueError("no shards to index")
    token = _token(fingerprint, text)
    with ThreadPoolExecutor(_READS if is_remote(shards[0]) else 1) as threads:
        found = threads.map(partial(_counted, token=token), shards)
        counted = {s: counts for s, counts in zip(shards, found, strict=True) if counts}
    missing = [shard for shard in shards if shard not in counted]
    if missing:
        tell(len(missing))
    turn = int(begin * len(missing))
    missing = missing[turn:] + missing[:turn]
    counts = count_tokens(missing, cost, fingerprint, executor, text)
    for shard, arrays in zip(missing, counts, strict=True):
        counted[shard] = arrays
        if stop():
            raise InterruptedError("indexing was stopped")
    ordered = [counted[shard] for shard in shards]
    return _assemble(shards, ordered, fingerprint, name or source_name(shards, text), text)


def count_tokens(
    shards: Sequence[Path],
    cost: Callable[[Document], Cost],
    fingerprint: str,
    executor: Executor = HERE,
    text: str | None = None,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the index of each shard with its token counts; arguments and errors as `build_index`.

    What was counted is kept beside the shard, or on this machine if it lies elsewhere.
    """
    work = partial(_token_counts, cost=cost, token=_token(fingerprint, text), text=text)
    return executor.each(work, shards)


def source_names(
    sources: Sequence[Sequence[Path]], texts: Sequence[str | None] | None = None
) -> list[str]:
    """A name for each source, from its shards: `captions` for captions-000000.tar.

    A source that takes a text variant has it in its name: `captions:alt`.

    Sources that would share one are told apart by as many folders as that takes (`a/captions`,
    `b/captions`), and by a number when they lie in one folder.
    """
    variants = [None] * len(sources) if texts is None else texts
    parts = [
        (*paths[0].absolute().parent.parts[1:], source_name(paths, text))
        for paths, text in zip(sources, variants, strict=True)
    ]
    names: list[str] = []
    for own in parts:
        rivals = {other for other in parts if other[-1] == own[-1] and other != own}
        depth = 1
        while depth < len(own) and any(other[-depth:] == own[-depth:] for other in rivals):
            depth += 1
        name = "/".join(own[-depth:])
        same = sum(other == own for other in parts[: len(names)])
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def _token_counts(
    shard: Path, *, cost: Callable[[Document], Cost], token: str, text: str | None
) -> _Arrays:
    """The token counts of a shard, from the cache beside it or counted now."""
    counted = _counted(shard, token)
    if counted is not None:
        return counted
    index = read_index(shard)
    counts = _count(shard, index, cost, text)
    if text is not None:
        counts |= pack_strings("text", [text])  # for people: `info` says what was counted
    cache = _cache(shard, token)
    with suppress(OSError):  # a folder that cannot be written costs time, nothing else
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(cache, counts)
    return index | counts


def _counted(shard: Path, token: str) -> _Arrays | None:
    """The index of a shard with its token counts, if they are there."""
    index = read_index(shard)
    try:
        counts = load_arrays(_cache(shard, token))
        if np.array_equal(counts["sha256"], index["sha256"]):
            return index | counts
    except (FileNotFoundError, ValueError, KeyError):
        pass  # no cache yet, or a damaged one: it is only a cache
    return None


def _cache(shard: Path, token: str) -> Path:
    home = local_folder(shard) if is_remote(shard) else shard.parent
    return home / (shard.name.removesuffix(".tar") + f".tokens-{token}.npz")


def _token(fingerprint: str, text: str | None) -> str:
    """What token counts are kept under."""
    about = fingerprint if text is None else json.dumps([fingerprint, text])
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def _count(
    shard: Path, index: _Arrays, cost: Callable[[Document], Cost], variant: str | None
) -> _Arrays:
    overhead: list[int] = []
    piece_count: list[int] = []
    piece_text: list[int] = []
    piece_images: list[int] = []
    refused: list[int] = []
    reasons: list[str] = []
    left_out: list[int] = []
    first_image = _starts(index["image_count"]).tolist()
    with OpenFiles() as files:
        for number in range(len(index["offset"])):
            try:
                size, offset = int(index["size"][number]), int(index["offset"][number])
                span, crc = files.read(shard, offset, size), int(index["crc"][number])
                document = parse_span(span, crc, variant)
                price, unseen = checked_cost(document, cost)
                left_out += [first_image[number] + at for at in unseen]
            except DocumentError as error:
                price = Cost(0, ())
                refused.append(number)
                reasons.append(str(error))
            overhead.append(price.overhead)
            piece_count.append(len(price.pieces))
            piece_text.extend(text for text, _ in price.pieces)
            piece_images.extend(len(images) for _, images in price.pieces)
    return {
        "sha256": index["sha256"],
        "overhead": np.array(overhead, dtype=np.int32),
        "piece_count": np.array(piece_count, dtype=np.int32),
        "piece_text": np.array(piece_text, dtype=np.int32),
        "piece_images": np.array(piece_images, dtype=np.int32),
        "cost_refused": np.array(refused, dtype=np.int64),
        **pack_strings("cost_reasons", reasons),
        **({"left_out": np.array(left_out, dtype=np.int64)} if left_out else {}),
    }


def source_name(shards: Sequence[Path], text: str | None = None) -> str:
    """What people call a source: its first shard's name without the number; its text variant."""
    name = re.sub(r"-\d+$", "", shards[0].name.removesuffix(".tar"))
    return name if text is None else f"{name}:{text}"


def _assemble(
    shards: list[Path], counted: list[_Arrays], fingerprint: str, name: str, text: str | None
) -> Index:
    def joined(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([arrays[name] for arrays in counted]).astype(dtype, copy=False)

    documents = [len(arrays["offset"]) for arrays in counted]
    refused = [item for arrays in counted for item in read_refusals(arrays, name)]
    refused_documents = 0
    for arrays in counted:
        numbers = arrays["cost_refused"].tolist()
        if numbers:
            keys = unpack_strings(arrays, "keys")
            reasons = unpack_strings(arrays, "cost_reasons")
            refused += [
                Refusal(name, keys[number], reason)
                for number, reason in zip(numbers, reasons, strict=True)
            ]
            refused_documents += len(numbers)
    used = [_used_images(arrays) for arrays in counted]
    digest = hashlib.sha256(fingerprint.encode())
    if text is not None:  # two variants may be equally long everywhere
        digest.update(json.dumps({"text": text}).encode())
    for arrays in counted:
        for field in ("sha256", "offset", "size", "overhead", "piece_count", "piece_text"):
            digest.update(np.ascontiguousarray(arrays[field]).tobytes())
        for field in ("piece_images", "height", "width", *({"left_out"} & arrays.keys())):
            digest.update(np.ascontiguousarray(arrays[field]).tobytes())
    return Index(
        name=name,
        paths=shards,
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), documents),
        offset=joined("offset", np.int64),
        size=joined("size", np.int64),
        crc=joined("crc", np.uint32),
        overhead=joined("overhead", np.int32),
        piece_start=_starts(joined("piece_count", np.int64)),
        piece_text=joined("piece_text", np.int32),
        piece_image_start=_starts(joined("piece_images", np.int64)),
        height=np.concatenate([a["height"][u] for a, u in zip(counted, used, strict=True)]),
        width=np.concatenate([a["width"][u] for a, u in zip(counted, used, strict=True)]),
        refused=refused,
        refused_documents=refused_documents,
        fingerprint=digest.hexdigest(),
        _shard_start=_starts(np.array(documents, dtype=np.int64)),
        _files=OpenFiles(),
        text=text,
    )


def _used_images(arrays: _Arrays) -> NDArray[np.bool_]:
    """Which images of a shard pieces refer to: not those of a refused document."""
    keep = np.ones(len(arrays["offset"]), dtype=bool)
    keep[arrays["cost_refused"]] = False
    used = np.repeat(keep, arrays["image_count"])
    used[arrays.get("left_out", [])] = False
    return used


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
