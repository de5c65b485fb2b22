"""A data set becomes the same shards however many processes write it and however often they die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from packing_toys import png

from data_packing.formats import drafts
from data_packing.ledger import Refusal
from data_packing.shard_file import DUPLICATE
from data_packing.sharding import Draft, identity_of, shard
from data_packing.shards import expand, read_document, read_index

COMMAND = "import sys; sys.argv[0] = 'mllm'; from mllm.cli import main; main()"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """60 records: one without its image, one line that is no JSON."""
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = []
    for number in range(60):
        (folder / f"{number}.png").write_bytes(png(seed=number))
        image = "nowhere.png" if number == 17 else f"{number}.png"
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": f"thing {number}"},
        ]
        record = {"id": f"r{number}", "image": image, "conversations": turns}
        lines.append("not json" if number == 31 else json.dumps(record))
    path = folder / "talk.jsonl"
    path.write_text("\n".join(lines))
    return path


def write(source: Path, out: Path, workers: int = 1, **changes: Any) -> Any:
    read = partial(drafts, source, "llava")
    return shard(read, {"files": identity_of(source)}, out, "s", 7, workers, **changes)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    report = write(source, tmp_path / "once")
    assert (report.documents, report.images, len(report.paths)) == (58, 58, 9)
    assert [item.key for item in report.refused] == ["r17", "line 32"]
    return bytes_of(tmp_path / "once")


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_processes_writes_the_same_bytes(
    source: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    told: list[int] = []
    write(source, tmp_path / "out", workers, tell=told.append)
    assert bytes_of(tmp_path / "out") == expected
    assert told[-1] == 60
    assert told == sorted(told)


def broken_off(source: Path, after: int) -> Iterator[Draft]:
    for number, draft in enumerate(drafts(source, "llava")):
        if number == after:
            raise OSError(5, "the cable was pulled", str(source))
        yield draft


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_goes_on_and_reads_nothing_twice(
    source: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    out, identity = tmp_path / "out", {"files": identity_of(source)}
    with pytest.raises(OSError, match="cable"):
        shard(partial(broken_off, source, 45), identity, out, "s", 7, workers)
    assert [path.name for path in out.iterdir()] == [".s.writing"]
    with pytest.raises(ValueError, match="no shard"):
        expand(out)
    done = [int(path.name[2:8]) for path in (out / ".s.writing").glob("*.npz")]
    assert done
    for number in (7 * whole + place for whole in done for place in range(7)):
        (source.parent / f"{number}.png").unlink(missing_ok=True)  # nobody opens it again
    write(source, out, workers)
    assert bytes_of(out) == expected


def test_other_data_or_settings_start_over(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="cable"):
        shard(partial(broken_off, source, 45), {"files": "older"}, out, "s", 7)
    (out / ".s.writing" / "s-000000.tar").write_bytes(b"of older data")
    write(source, out)
    assert bytes_of(out) == expected


def test_a_killed_command_goes_on(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "s"
    arguments = ["data", "shard", str(source), str(out), "--documents-per-shard", "7"]
    command = [sys.executable, "-c", COMMAND, *arguments, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not list(out.glob(".s.writing/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "58 documents with 58 images in 9 shards" in done.stdout
    assert "2 refused" in done.stdout
    assert "documents/s" in done.stderr
    assert bytes_of(out) == expected


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    def read() -> Iterator[Draft]:
        with pytest.raises(ValueError, match="another run is writing these shards"):
            write(source, tmp_path / "out")
        yield from drafts(source, "llava")

    shard(read, {"files": identity_of(source)}, tmp_path / "out", "s", 7)
    assert len(expand(tmp_path / "out")) == 9


def killed(source: Path) -> Iterator[Draft]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield from ()


def failing(source: Path) -> Iterator[Draft]:
    raise ValueError(f"{source} is not a data set")
    yield


@pytest.mark.parametrize(
    ("read", "kind", "reason"),
    [(killed, OSError, "ended from outside"), (failing, ValueError, "is not a data set")],
)
def test_what_happens_to_a_process_is_said(
    source: Path,
    tmp_path: Path,
    read: Callable[[Path], Iterator[Draft]],
    kind: type[Exception],
    reason: str,
) -> None:
    with pytest.raises(kind, match=reason):
        shard(partial(read, source), {}, tmp_path / "out", "s", 7, 2)
    assert not (tmp_path / "out").exists()


def repeated(source: Path) -> Iterator[Draft]:
    """Every record twice, the second time in another shard."""
    for _ in range(2):
        yield from drafts(source, "llava")


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_that_share_a_name_are_all_used(source: Path, tmp_path: Path, workers: int) -> None:
    lines = source.read_text().splitlines()[:10]
    source.write_text("\n".join(lines * 2))
    report = write(source, tmp_path / "out", workers)
    assert (report.documents, report.refused) == (20, [])
    keys = [
        read_document(path, number).key
        for path in report.paths
        for number in range(len(read_index(path)["offset"]))
    ]
    again = [f"r{number} (line {number + 11})" for number in range(10)]
    assert keys == [*(f"r{number}" for number in range(10)), *again]


def test_a_key_of_another_shard_is_refused(source: Path, tmp_path: Path) -> None:
    report = shard(partial(repeated, source), {}, tmp_path / "out", "s", 7, 2)
    assert (report.documents, report.images) == (58, 58)
    again = [item for item in report.refused if item.reason == DUPLICATE]
    assert len(again) == 58
    assert Refusal("s", "r59", DUPLICATE) in report.refused
    keys = []
    for path in report.paths:
        for number in range(len(read_index(path)["offset"])):
            document = read_document(path, number)
            assert len(document.images) == 1
            keys.append(document.key)
    assert keys == [f"r{number}" for number in range(60) if number not in (17, 31)]
