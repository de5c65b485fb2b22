"""Every defect of shards, each with the key of its document.

Errors are what training would lose, refuse or learn wrongly; warnings are what a person should look
at. Each shard is first checked as a file, then every document is read and every image decoded.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from data_packing.document import Document, DocumentError, Image, Text
from data_packing.executors import HERE, Executor
from data_packing.files import unpack_strings
from data_packing.images import TooManyPixels, decode
from data_packing.ledger import Refusal
from data_packing.scan import Chunk, Rules, cached_index, divided, read_chunk, scan
from data_packing.shards import index_path, load_index, read_refusals
from data_packing.slices import cut_one
from data_packing.wording import counted

TINY = 10
"""Pixels; an image with a shorter side is one that nobody can see."""

ERRORS = {
    "missing index": "a shard without its index: its writing was interrupted",
    "damaged index": "an index that cannot be read",
    "truncated shard": "a tar file that ends too early",
    "changed shard": "a tar file that is not the one that was indexed",
    "refused when sharded": "a record that is not in the shards, with the reason",
    "damaged document": "bytes that are no document",
    "duplicate key": "two documents of a source with one key",
    "no learned text": "a document that teaches nothing",
    "undecodable image": "an image that is broken, truncated or of an unknown format",
    "too many pixels": "an image above the limit of pixels, such as a decompression bomb",
    "wrong image size": "an image of another size than its record says",
    "special token in text": "text that would end a turn or fake an image",
    "refused by the model": "a document that the model's template refuses",
    "piece above a pack": "a piece that no pack can hold, and that is lost",
}
WARNINGS = {
    "duplicate document": "the same texts and images as an earlier document",
    "empty text": "a text of nothing but space",
    "tiny image": f"an image with a side below {TINY} pixels",
    "replacement character": "text that lost a character when it was decoded (U+FFFD)",
    "control character": "text with an invisible character that is no tab or line end",
    "document above a pack": "a document that is cut into several slices",
}

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_HASHED = 2**20


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong.

    Attributes:
        kind: a key of ERRORS or WARNINGS.
        source, shard: where.
        key: of the document or record; empty when the shard as a file is meant.
        detail: what exactly, written for a person.
    """

    kind: str
    source: str
    shard: str
    key: str
    detail: str

    @property
    def level(self) -> str:
        """How grave it is: error or warning."""
        return "error" if self.kind in ERRORS else "warning"

    def to_json(self) -> dict[str, str]:
        """As a line for scripts."""
        return {"level": self.level, **asdict(self)}


@dataclass(slots=True)
class Report:
    """What was looked at, and every defect in the order of the shards."""

    shards: int = 0
    documents: int = 0
    images: int = 0
    defects: list[Defect] = field(default_factory=list)

    def count(self, level: str) -> int:
        """How many defects are errors, or warnings."""
        return sum(defect.level == level for defect in self.defects)


Found = list[tuple[str, str]]
"""(kind, detail) of what is wrong with one document."""
_Seen = tuple[int, int, bytes, Found]
"""(row, images, digest of the content, what is wrong)."""


def lint(
    sources: dict[str, list[Path]],
    *,
    rules: Rules | None = None,
    tokens: int | None = None,
    executor: Executor = HERE,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Look at every document.

    Args:
        sources: the shards of each source, as `find_sources` gives them.
        rules: what a model says; without it texts are not searched for special tokens.
        tokens: what a pack holds; needs `rules`.
        executor: who looks.
        advance: told (documents done, documents in all).

    Raises:
        ValueError: `tokens` without `rules`.
    """
    if tokens is not None and rules is None:
        raise ValueError("how many tokens a document takes is only known with a model: give one")
    report, shards = Report(), [Chunk(name, path) for name in sources for path in sources[name]]
    chunks: list[Chunk] = []
    keys: dict[str, dict[str, Path]] = {}
    with ThreadPoolExecutor(
        max(1, executor.workers)
    ) as pool:  # hashing leaves the interpreter free
        checked = list(pool.map(check_shard, shards))
    for shard, (defects, own, refused) in zip(shards, checked, strict=True):
        report.shards += 1
        report.defects += [Defect(k, shard.source, str(shard.shard), "", d) for k, d in defects]
        report.defects += [
            Defect("refused when sharded", shard.source, str(shard.shard), item.key, item.reason)
            for item in refused
        ]
        report.defects += _repeated(shard, own, keys.setdefault(shard.source, {}))
        chunks += divided(shard.source, shard.shard, len(own))
    total, first = sum(chunk.stop - chunk.start for chunk in chunks), dict[bytes, str]()
    advance(0, total)
    work = partial(check_chunk, rules=rules, tokens=tokens)
    for chunk, seen in scan(work, chunks, executor):
        names = unpack_strings(cached_index(chunk.shard), "keys")
        for row, images, digest, found in seen:
            report.documents += 1
            report.images += images
            here = f"{chunk.source} {names[row]}"
            if digest and first.setdefault(digest, here) != here:
                found.append(("duplicate document", f"the same as {first[digest]}"))
            report.defects += [
                Defect(kind, chunk.source, str(chunk.shard), names[row], detail)
                for kind, detail in found
            ]
        advance(report.documents, total)
    return report


def _repeated(shard: Chunk, own: Sequence[str], seen: dict[str, Path]) -> list[Defect]:
    """Keys that an earlier document of the source has; `seen` grows by the others."""
    defects = []
    for key in own:
        if key in seen:
            detail = f"an earlier document in {seen[key].name} has the same key"
            defects.append(Defect("duplicate key", shard.source, str(shard.shard), key, detail))
        seen.setdefault(key, shard.shard)
    return defects


def check_shard(chunk: Chunk) -> tuple[Found, list[str], list[Refusal]]:
    """What is wrong with a shard as a file, the keys of its documents, and what was refused."""
    shard, name = chunk.shard, chunk.shard.name
    if not index_path(shard).is_file():
        found = [("missing index", f"{index_path(shard).name} does not lie beside {name}")]
        return found + _torn(shard), [], []
    try:
        index = load_index(shard)
        keys, refused = unpack_strings(index, "keys"), read_refusals(index, chunk.source)
        if not len(keys) == len(index["offset"]) == len(index["size"]):
            raise ValueError(f"{index_path(shard)} names {len(keys)} of its documents")
    except (ValueError, KeyError) as error:
        return [("damaged index", str(error))], [], []
    actual, expected = shard.stat().st_size, int(index["tar_size"])
    sizes = f"{actual:,} bytes, its index says {expected:,}"
    if actual < expected:
        return [("truncated shard", sizes)], keys, refused
    if actual > expected:
        return [("changed shard", sizes)], keys, refused
    if _sha256(shard) != index["sha256"].tobytes():
        found = [("changed shard", "the same size, but other bytes than were indexed")]
        return found, keys, refused
    return [], keys, refused


def _torn(shard: Path) -> Found:
    """Whether a tar file of which nothing else is known ends too early."""
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for _ in tar:
                pass
        return []
    except (tarfile.TarError, OSError, EOFError) as error:
        return [("truncated shard", f"{shard.stat().st_size:,} bytes; {error}")]


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED):
            digest.update(block)
    return digest.digest()


def check_chunk(chunk: Chunk, rules: Rules | None, tokens: int | None) -> list[_Seen]:
    """Look at every document of a chunk."""
    seen: list[_Seen] = []
    for row, document in read_chunk(chunk):
        if isinstance(document, DocumentError):
            seen.append((row, 0, b"", [("damaged document", str(document))]))
            continue
        found = check_document(document, rules, tokens)
        seen.append((row, len(document.images), content_hash(document), found))
    return seen


def content_hash(document: Document) -> bytes:
    """A digest of what a document says and shows, whatever its name: 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in document.parts:
        data = part.data if isinstance(part, Image) else part.text.encode("utf-8", "surrogatepass")
        learned = part.learned if isinstance(part, Text) else None
        variants = part.variants if isinstance(part, Text) else ()
        digest.update(f"{part.role}\0{learned}\0{len(data)}\0{len(variants)}\0".encode())
        digest.update(data)
        if isinstance(part, Text) and part.box is not None:
            digest.update(repr(part.box).encode())
        for said in chain.from_iterable(variants):
            words = said.encode("utf-8", "surrogatepass")
            digest.update(f"{len(words)}\0".encode())
            digest.update(words)
    return digest.digest()


def check_document(document: Document, rules: Rules | None, tokens: int | None) -> Found:
    """What is wrong with one document, whatever lies around it."""
    found: Found = []
    texts = [part for part in document.parts if isinstance(part, Text)]
    if not any(text.learned and (text.box or text.text.strip()) for text in texts):
        found.append(("no learned text", f"{counted(len(texts), 'text')}, none learned"))
    for place, words in _said(texts):
        found += [(kind, f"{place}: {why}") for kind, why in _text_defects(words)]
    for number, image in enumerate(document.images, start=1):
        found += [(kind, f"image {number}: {why}") for kind, why in _image_defects(image)]
    if rules is not None:
        found += _model_defects(document, texts, rules, tokens)
    return found


def _said(texts: Sequence[Text]) -> Iterator[tuple[str, str]]:
    """All words of a document, its variants too: (where, words)."""
    for number, text in enumerate(texts, start=1):
        yield f"text {number}", text.text
        for name, words in text.variants:
            yield f"text {number}, variant {name!r}", words


def _text_defects(text: str) -> Iterator[tuple[str, str]]:
    if not text.strip():
        length = counted(len(text), "character")
        yield "empty text", f"{length}, nothing but space" if text else "nothing"
    if at := text.count("\N{REPLACEMENT CHARACTER}"):
        first = text.index("\N{REPLACEMENT CHARACTER}")
        yield "replacement character", f"{at} of them, the first after {_before(text, first)}"
    if marks := _CONTROL.findall(text):
        code, before = ord(marks[0]), _before(text, text.index(marks[0]))
        yield "control character", f"{len(marks)} of them, the first U+{code:04X} after {before}"


def _before(text: str, place: int) -> str:
    """The words before a place, to find it by."""
    return repr(text[max(0, place - 20) : place]) if place else "nothing"


def _image_defects(image: Image) -> Iterator[tuple[str, str]]:
    try:
        height, width = decode(image.data).shape[:2]
    except TooManyPixels as error:
        yield "too many pixels", str(error)
        return
    except DocumentError as error:
        yield "undecodable image", str(error)
        return
    if (height, width) != (image.height, image.width):
        says = f"{image.height}x{image.width}"
        yield "wrong image size", f"{height}x{width} (height x width), its record says {says}"
    if min(height, width) < TINY:
        yield "tiny image", f"{height}x{width} pixels (height x width)"


def _model_defects(
    document: Document, texts: Sequence[Text], rules: Rules, tokens: int | None
) -> Iterator[tuple[str, str]]:
    special = [(place, rules.special(words)) for place, words in _said(texts)]
    named = [(place, token) for place, token in special if token is not None]
    for place, token in named:
        yield "special token in text", f"{place} contains {token!r}"
    if named:
        return
    try:
        price = rules.cost(document)
    except DocumentError as error:
        yield "refused by the model", str(error)
        return
    if tokens is None:
        return
    costs = [rules.image_cost(image.height, image.width)[0] for image in document.images]
    pieces = [text + sum(costs[at] for at in images) for text, images in price.pieces]
    if price.overhead + sum(pieces) <= tokens:
        return
    rows, lost = cut_one(pieces, [0] * len(pieces), price.overhead, tokens, 0)
    for reason in lost:
        yield "piece above a pack", reason
    if rows:
        needs = f"{price.overhead + sum(pieces):,} tokens, a pack holds {tokens:,}"
        yield "document above a pack", f"{needs}: cut into {len(rows)}"


def summary(report: Report) -> dict[str, Any]:
    """The counts, for scripts."""
    kinds: dict[str, int] = {}
    for defect in report.defects:
        kinds[defect.kind] = kinds.get(defect.kind, 0) + 1
    return {
        "shards": report.shards,
        "documents": report.documents,
        "images": report.images,
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "kinds": kinds,
    }
