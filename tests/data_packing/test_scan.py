from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from packing_toys import captions, cost, index_of

from data_packing import scan as scan_module
from data_packing.document import Document, DocumentError
from data_packing.executors import Executor
from data_packing.scan import Chunk, divided, find_sources, processes, read_chunk, scan
from data_packing.sharding import write_shards


def keys(chunk: Chunk) -> list[str]:
    return [one.key for _, one in read_chunk(chunk) if isinstance(one, Document)]


def die(chunk: Chunk) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_shards_are_found_by_source_and_what_lies_beside_them_is_not(tmp_path: Path) -> None:
    write_shards(captions(4), tmp_path / "a", "one", 2)
    index_of(captions(2), tmp_path / "b", "one")  # leaves a token cache
    write_shards(captions(2), tmp_path / "b", "two")
    found = find_sources([f"{tmp_path}/a", f"{tmp_path}/b/*"])
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "a/one": ["one-000000.tar", "one-000001.tar"],
        "b/one": ["one-000000.tar"],
        "two": ["two-000000.tar"],
    }
    with pytest.raises(ValueError, match="no shard"):
        find_sources([f"{tmp_path}/b/*.npz"])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_document_is_seen_once_in_order(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "CHUNK", 3)
    path = write_shards(captions(8), tmp_path, "s").paths[0]
    chunks = divided("s", path, 8)
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(0, 3), (3, 6), (6, 8)]
    found = [key for _, own in scan(keys, chunks, Executor("local", workers)) for key in own]
    assert found == [f"k{number}" for number in range(8)]


def test_a_document_that_cannot_be_read_is_told_and_the_next_one_read(tmp_path: Path) -> None:
    path = write_shards(captions(3), tmp_path, "s").paths[0]
    data = bytearray(path.read_bytes())
    data[:5] = b"\xff" * 5
    path.write_bytes(data)
    seen = [one for _, one in read_chunk(Chunk("s", path, 0, 3))]
    assert isinstance(seen[0], DocumentError)
    assert [one.key for one in seen[1:] if isinstance(one, Document)] == ["k1", "k2"]
    assert cost(seen[1]).pieces


def test_a_worker_that_is_killed_is_one_message(tmp_path: Path) -> None:
    path = write_shards(captions(2), tmp_path, "s").paths[0]
    with pytest.raises(ValueError, match="a worker was killed"):
        list(scan(die, [Chunk("s", path), Chunk("s", path)], Executor("local", 2)))


def test_processes_are_started_for_much_data_or_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"s": write_shards(captions(2), tmp_path, "s").paths}
    assert processes(sources, None) == 1
    assert processes(sources, 3) == 3
    monkeypatch.setattr(scan_module, "MUCH", 100)
    assert processes(sources, None) == len(os.sched_getaffinity(0))
