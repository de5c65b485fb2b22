from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from packing_toys import captions, cost, index_of, page

from data_packing.document import Document, DocumentError, Text
from data_packing.executors import Executor
from data_packing.index import build_index
from data_packing.ledger import Refusal
from data_packing.sample import Cost
from data_packing.sharding import write_shards
from data_packing.shards import index_path


def refuse_long(document: Document) -> Cost:
    if len(document.parts) > 2:
        raise DocumentError("too many parts")
    return cost(document)


def test_the_index_holds_what_every_piece_costs(tmp_path: Path) -> None:
    index = index_of([*captions(2), page([3, 5], images=True)], tmp_path, per_shard=2)
    assert len(index) == 3
    assert index.name == "toys"
    assert index.overhead.tolist() == [1, 1, 1]
    assert index.piece_start.tolist() == [0, 1, 2, 4]
    assert index.piece_text.tolist()[2:] == [3, 5]
    assert index.piece_image_start.tolist() == [0, 1, 2, 3, 4]
    assert index.height.tolist() == [8] * 4
    assert index.width.tolist() == [9] * 4


def test_documents_and_keys_are_found_by_number(tmp_path: Path) -> None:
    documents = list(captions(7))
    index = index_of(documents, tmp_path, per_shard=3)
    copy = pickle.loads(pickle.dumps(index))
    for number in (6, 0, 3, 2):
        assert index.read(number) == copy.read(number) == documents[number]
        assert index.key(number) == documents[number].key
    index.close()
    assert index.read(1) == documents[1]


def test_what_is_refused_is_named_and_costs_nothing(tmp_path: Path) -> None:
    documents = [
        *captions(1),
        page([3, 5], "long", images=True),
        *captions(1, start=5),
        Refusal("raw", "bad", "broken image"),
    ]
    report = write_shards(documents, tmp_path, "toys")
    index = build_index(report.paths, refuse_long, "f")
    assert index.refused == [
        Refusal("toys", "bad", "broken image"),
        Refusal("toys", "long", "too many parts"),
    ]
    assert index.refused_documents == 1
    assert index.piece_start.tolist() == [0, 1, 1, 2]
    assert len(index.height) == 2
    again = build_index(report.paths, refuse_long, "f")
    assert again.refused == index.refused


def test_token_counts_are_cached_by_fingerprint(tmp_path: Path) -> None:
    paths = write_shards(captions(4), tmp_path, "toys", 2).paths
    calls = []

    def counting(document: Document) -> Cost:
        calls.append(document.key)
        return cost(document)

    first = build_index(paths, counting, "f")
    second = build_index(paths, counting, "f")
    assert len(calls) == 4
    assert first.fingerprint == second.fingerprint
    other = build_index(paths, counting, "g")
    assert len(calls) == 8
    assert other.fingerprint != first.fingerprint


def test_a_cache_of_other_shards_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    paths = write_shards(captions(4), tmp_path, "toys").paths
    before = build_index(paths, cost, "f")
    cache = next(tmp_path.glob("*.tokens-*.npz"))
    stale = cache.read_bytes()
    write_shards(captions(4, start=50), tmp_path, "toys")
    assert not cache.exists()
    cache.write_bytes(stale)
    after = build_index(paths, cost, "f")
    assert after.piece_text.tolist() != before.piece_text.tolist()
    cache.write_bytes(b"rubbish")
    assert build_index(paths, cost, "f").fingerprint == after.fingerprint


def test_workers_count_the_same(tmp_path: Path) -> None:
    paths = write_shards(captions(6), tmp_path, "toys", 2).paths
    with_workers = build_index(paths, cost, "f", Executor("local", 2))
    for cache in tmp_path.glob("*.tokens-*"):
        cache.unlink()
    assert build_index(paths, cost, "f").fingerprint == with_workers.fingerprint


def test_unfinished_shards_are_refused(tmp_path: Path) -> None:
    paths = write_shards(captions(4), tmp_path, "toys", 2).paths
    index_path(paths[1]).unlink()
    with pytest.raises(ValueError, match=r"toys-000001\.tar has no index"):
        build_index(paths, cost, "f")
    with pytest.raises(ValueError, match="no shards"):
        build_index([], cost, "f")


def test_a_cost_function_that_is_wrong_is_caught_with_the_key(tmp_path: Path) -> None:
    paths = write_shards(captions(1), tmp_path, "toys").paths
    with pytest.raises(ValueError, match="'k0' names the images \\[\\]"):
        build_index(paths, lambda document: Cost(1, ((3, ()),)), "f")
    with pytest.raises(RuntimeError, match="'k0': division by zero"):
        build_index(paths, lambda document: 1 / 0, "g")  # type: ignore[arg-type, return-value]


def test_a_document_of_system_parts_alone_is_refused(tmp_path: Path) -> None:
    lonely = Document((Text("rules", "system"),), "toys", "lonely")
    index = index_of([*captions(1), lonely], tmp_path)
    assert [item.key for item in index.refused] == ["lonely"]
    assert "nothing to learn" in index.refused[0].reason
