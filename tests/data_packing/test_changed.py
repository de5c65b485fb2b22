"""A shard that changes after it was indexed: nothing of it is taken for what it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from packing_toys import captions, encode, image_cost, index_of

from data_packing.document import DocumentError
from data_packing.loader import Loader
from data_packing.plan import Plan
from data_packing.sharding import write_shards
from data_packing.shards import index_path, read_document

CHANGED = "not the bytes that were indexed"


def rewritten(path: Path) -> None:
    """Other documents of the same size at the same places, with an index of their own."""
    write_shards(captions(10, start=50), path.parent, "toys")


def one_bit(path: Path) -> None:
    """A flipped bit in a picture's pixels, where no format notices it."""
    data = bytearray(path.read_bytes())
    data[path.stat().st_size // 2] ^= 1
    path.write_bytes(data)


def gone(path: Path) -> None:
    """Emptied, and its index deleted."""
    os.truncate(path, 0)
    index_path(path).unlink()


@pytest.mark.parametrize(
    ("change", "fewest", "most"), [(rewritten, 10, 10), (one_bit, 1, 1), (gone, 10, 10)]
)
def test_what_changed_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path], None], fewest: int, most: int
) -> None:
    index = index_of(list(captions(10)), tmp_path)
    plan = Plan(
        [index],
        [1.0],
        processor_fingerprint="p",
        image_cost=image_cost,
        tokens=64,
        patches=512,
        tokens_per_step=128,
        seed=0,
        epochs=1,
    )
    change(index.paths[0])
    loader = Loader(plan, encode, rank=0, world=1, workers=0)
    packs = [pack for _, packs in loader for pack in packs]
    refused = [item for pack in packs for item in pack.refused]
    assert fewest <= len(refused) <= most
    assert all(CHANGED in item.reason for item in refused)
    assert len({item.key for item in refused}) == len(refused)
    named = {item.key[:1] for item in refused}
    assert named == ({"k"} if change is one_bit else {"t"})  # k3, or toys-000000.tar, document 3
    kept = [key for pack in packs for key in pack.keys]
    assert len(kept) + len(refused) == 10
    assert set(kept) <= {f"k{number}" for number in range(10)}


def test_a_single_document_is_checked_too(tmp_path: Path) -> None:
    index = index_of(list(captions(1)), tmp_path)
    one_bit(index.paths[0])
    with pytest.raises(DocumentError, match=CHANGED):
        index.read(0)
    with pytest.raises(DocumentError, match=CHANGED):
        read_document(index.paths[0], 0)
