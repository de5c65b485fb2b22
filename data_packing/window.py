"""A window of the corpus with its documents cut to what a pack holds: what a plan packs from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from data_packing.corpus import Corpus
from data_packing.index import Index
from data_packing.ledger import Refusal
from data_packing.slices import ImageCost, Slices, cut


@dataclass(slots=True)
class Window:
    """Some shards of every source.

    Attributes:
        number: in the corpus.
        indexes, slices: one per source; its documents cut to what a pack holds.
        fingerprint: of all of it.
        units, tokens: slices of all sources, and their tokens.
        records: that sharding read.
    """

    number: int
    indexes: list[Index]
    slices: list[Slices]
    fingerprint: str
    units: int
    tokens: int
    records: int

    def refused(self, source: int) -> list[Refusal]:
        """The records of a source of which nothing can be used."""
        return [*self.indexes[source].refused, *self.slices[source].refused]

    def all_refused(self) -> list[Refusal]:
        """Those of every source."""
        return [item for source in range(len(self.indexes)) for item in self.refused(source)]


def open_window(
    corpus: Corpus, number: int, image_cost: ImageCost, tokens: int, patches: int
) -> Window:
    """Index a window of a corpus and cut its documents.

    Args:
        image_cost: (height, width) -> (language tokens, vision patches).
        tokens, patches: what a pack holds.

    Raises:
        ValueError: a shard that cannot be used, or two sources of one name.
    """
    indexes = corpus.load(number)
    names = [index.name for index in indexes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two sources are named {name!r}, so their documents could not be told apart; "
                "give build_index other names (source_names makes them)"
            )
    slices = [cut(index, image_cost, tokens, patches) for index in indexes]
    digest = hashlib.sha256()
    for index, units in zip(indexes, slices, strict=True):
        digest.update(index.fingerprint.encode())
        for column in (units.document, units.stop_piece, units.tokens, units.patches):
            digest.update(np.ascontiguousarray(column).tobytes())
    return Window(
        number,
        indexes,
        slices,
        digest.hexdigest()[:32],
        units=sum(map(len, slices)),
        tokens=sum(int(units.tokens.sum()) for units in slices),
        records=sum(index.records for index in indexes),
    )
