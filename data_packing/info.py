"""What lies in shards, in numbers: for each source, and in all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_packing.document import Document, DocumentError, Image, Text
from data_packing.executors import HERE, Executor
from data_packing.files import load_arrays, unpack_strings
from data_packing.images import kind
from data_packing.scan import Chunk, Rules, divided, read_chunk, scan
from data_packing.shards import read_index
from data_packing.writing import count_scripts

_SPECIFIC = re.compile(r"'[^']*'|\"[^\"]*\"|\S+\.[A-Za-z]{2,5}\b|\S*\d\S*")
_CACHE = re.compile(r"\.tokens-([0-9a-f]+)\.npz")

CHARACTERS = "characters of a text"
IMAGES = "images of a document"
HEIGHT, WIDTH = "height of an image", "width of an image"
_COUNTERS = ("kinds", "formats", "scripts", "variants", "refused")
TEXT_TOKENS, TOKENS = "text tokens of a document", "tokens with images"


@dataclass(frozen=True, slots=True)
class Spread:
    """How many numbers there are, and how they are spread.

    Attributes:
        count, total, least, most, mean, median: of all of them.
        bins: (low, high, count) with low <= number < high, doubling; none where nothing is.
    """

    count: int
    total: int
    least: int
    most: int
    mean: float
    median: float
    bins: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> Spread | None:
        """The spread of some numbers (0 or more), None where there are none."""
        if not len(values):
            return None
        exponents = np.frexp(values.astype(np.float64))[1]  # 0 for 0, n for [2**(n-1), 2**n)
        counts = np.bincount(exponents)
        bins = [
            (2 ** (n - 1) if n else 0, 2**n if n else 1, int(counts[n])) for n in range(len(counts))
        ]
        first = int(exponents.min())
        return cls(
            count=len(values),
            total=int(values.sum()),
            least=int(values.min()),
            most=int(values.max()),
            mean=float(values.mean()),
            median=float(np.median(values)),
            bins=tuple(bins[first:]),
        )


@dataclass(slots=True)
class Facts:
    """What was counted; two can be added.

    Attributes:
        kinds: captions (an image, then text), pages (other raw documents with images), texts (raw,
            no image) and conversations.
        formats: of images, by the file's own header; "unreadable" where that fails.
        scripts: letters by script, see writing.py.
        variants: texts that have a variant, by its name.
        refused: records that are not in the shards, by reason without names and numbers.
        unreadable: documents whose bytes are damaged.
        measures: numbers of which the spread is shown.
        caches: token cache, and the text variant that it is of → text tokens of documents that it
            has counted, one array per shard.
    """

    shards: int = 0
    bytes: int = 0
    documents: int = 0
    images: int = 0
    texts: int = 0
    learned_texts: int = 0
    unreadable: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    variants: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    measures: dict[str, list[NDArray[np.int64]]] = field(default_factory=dict)
    caches: dict[str, list[NDArray[np.int64]]] = field(default_factory=dict)

    def add(self, other: Facts) -> None:
        """Add what another counted."""
        for name in ("shards", "bytes", "documents", "images", "texts", "learned_texts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.unreadable += other.unreadable
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for name in ("measures", "caches"):
            for key, arrays in getattr(other, name).items():
                getattr(self, name).setdefault(key, []).extend(arrays)

    def spreads(self) -> dict[str, Spread]:
        """The spread of every measure that has numbers.

        Text tokens come from a cache only where it covers every shard.
        """
        joined = dict(self.measures)
        for cache, arrays in sorted(self.caches.items()):
            if TEXT_TOKENS not in joined and len(arrays) == self.shards:
                joined[f"{TEXT_TOKENS} ({cache})"] = arrays
        found = {name: Spread.of(np.concatenate(arrays)) for name, arrays in joined.items()}
        return {name: spread for name, spread in found.items() if spread is not None}

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        names = ("shards", "bytes", "documents", "images", "texts", "learned_texts", "unreadable")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in _COUNTERS:
            values[name] = dict(getattr(self, name).most_common())
        values["spreads"] = {
            name: {
                **{part: getattr(spread, part) for part in spread.__slots__ if part != "bins"},
                "bins": [list(each) for each in spread.bins],
            }
            for name, spread in self.spreads().items()
        }
        return values


def survey(
    sources: dict[str, list[Path]],
    rules: Rules | None = None,
    executor: Executor = HERE,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Facts]:
    """Count what each source holds; every document is read, no image is decoded.

    Args:
        sources: the shards of each source, as `find_sources` gives them.
        rules: what a model says, for token counts; without it caches beside the shards are used.
        executor: who looks.
        advance: told (documents done, documents in all).

    Raises:
        ValueError: a shard or its index is missing, damaged, or they disagree (`lint` says more).
    """
    facts = {name: Facts() for name in sources}
    chunks: list[Chunk] = []
    for name, paths in sources.items():
        for path in paths:
            index = read_index(path)
            facts[name].add(_of_shard(path, index))
            chunks += divided(name, path, len(index["offset"]))
    total, done = sum(chunk.stop - chunk.start for chunk in chunks), 0
    advance(0, total)
    for chunk, counted in scan(partial(count_chunk, rules=rules), chunks, executor):
        facts[chunk.source].add(counted)
        done += chunk.stop - chunk.start
        advance(done, total)
    return facts


def together(facts: dict[str, Facts]) -> Facts:
    """All sources as one."""
    everything = Facts()
    for each in facts.values():
        everything.add(each)
    return everything


def general(reason: str) -> str:
    """A reason without what is particular to one record, so that like ones count together."""
    return _SPECIFIC.sub("…", reason)


def _of_shard(path: Path, index: dict[str, NDArray[Any]]) -> Facts:
    """What is known of a shard without its documents."""
    facts = Facts(shards=1, bytes=path.stat().st_size)
    facts.refused.update(map(general, unpack_strings(index, "refused_reasons")))
    facts.measures = {
        IMAGES: [index["image_count"].astype(np.int64)],
        HEIGHT: [index["height"].astype(np.int64)],
        WIDTH: [index["width"].astype(np.int64)],
    }
    facts.caches = dict(_caches(path, index))
    return facts


def _caches(
    path: Path, index: dict[str, NDArray[Any]]
) -> Iterator[tuple[str, list[NDArray[np.int64]]]]:
    """Text tokens of documents from the token caches beside a shard that fit its bytes."""
    stem = path.name.removesuffix(".tar")
    for cache in sorted(path.parent.glob(f"{stem}.tokens-*.npz")):
        match = _CACHE.fullmatch(cache.name.removeprefix(stem))
        try:
            counts = load_arrays(cache)
            if match is None or not np.array_equal(counts["sha256"], index["sha256"]):
                continue
            ends = np.concatenate([[0], np.cumsum(counts["piece_count"], dtype=np.int64)])
            sums = np.concatenate([[0], np.cumsum(counts["piece_text"], dtype=np.int64)])
            tokens = sums[ends[1:]] - sums[ends[:-1]] + counts["overhead"]
            variant = unpack_strings(counts, "text") if "text" in counts else []
        except (ValueError, KeyError, IndexError):
            continue  # a damaged cache: it is only a cache
        used = np.ones(len(tokens), dtype=bool)
        used[counts["cost_refused"]] = False
        yield ", ".join([match[1][:8], *variant]), [tokens[used].astype(np.int64)]


def count_chunk(chunk: Chunk, rules: Rules | None) -> Facts:
    """Count the documents of a chunk."""
    facts = Facts()
    lengths: list[int] = []
    tokens: dict[str, list[int]] = {TEXT_TOKENS: [], TOKENS: []} if rules else {}
    for _, document in read_chunk(chunk):
        facts.documents += 1
        if isinstance(document, DocumentError):
            facts.unreadable += 1
            continue
        facts.kinds[kind_of(document)] += 1
        for part in document.parts:
            if isinstance(part, Image):
                facts.images += 1
                facts.formats[_format(part)] += 1
            else:
                facts.texts += 1
                facts.learned_texts += part.learned
                facts.variants.update(name for name, _ in part.variants)
                facts.scripts.update(count_scripts(part.text))
                lengths.append(len(part.text))
        if rules is not None:
            _count_tokens(document, rules, tokens, facts)
    numbers = {CHARACTERS: lengths, **tokens}
    facts.measures = {name: [np.array(each, dtype=np.int64)] for name, each in numbers.items()}
    return facts


def kind_of(document: Document) -> str:
    """What a document is, for people: see `Facts.kinds`."""
    if document.is_conversation:
        return "conversations"
    if not document.images:
        return "texts"
    first, *others = document.parts
    alone = isinstance(first, Image) and others and all(isinstance(part, Text) for part in others)
    return "captions" if alone else "pages"


def _format(image: Image) -> str:
    try:
        return kind(image.data)
    except DocumentError:
        return "unreadable"


def _count_tokens(
    document: Document, rules: Rules, tokens: dict[str, list[int]], facts: Facts
) -> None:
    try:
        price = rules.cost(document)
    except DocumentError as error:
        facts.refused[f"by the model: {general(str(error))}"] += 1
        return
    text = price.overhead + sum(count for count, _ in price.pieces)
    shown = [document.images[at] for _, images in price.pieces for at in images]
    images = sum(rules.image_cost(image.height, image.width)[0] for image in shown)
    tokens[TEXT_TOKENS].append(text)
    tokens[TOKENS].append(text + images)
