"""Locks, atomic files, damaged checkpoints, progress, and what workers say."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mllm.recipe import load
from mllm.training import checkpoint_index as checkpoint
from mllm.training.control import Control, message, parent_lives, parent_mark
from mllm.training.launch import Tail
from mllm.training.progress import Screen, duration
from mllm.training.run_folder import (
    Lock,
    NoSpace,
    RunFolder,
    full_disk_is_clear,
    keep_lines_up_to,
    read_lines,
    write_atomically,
)
from tests.training import tiny
from tests.training.conftest import Runs


def test_a_lock_keeps_others_out_until_its_holder_dies(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mllm.training.run_folder import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.read()"
    )
    path = tmp_path / "lock"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    mine = Lock(path)
    assert not mine.acquire()
    assert mine.holder() == str(other.pid)
    other.kill()
    other.communicate()
    assert mine.acquire()
    mine.release()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_clearly_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NoSpace, match="no space left for") as refusal:
        write_atomically(path, "new")
    assert "run the same command again" in str(refusal.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), full_disk_is_clear(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(NoSpace), full_disk_is_clear(tmp_path / "gone" / "x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_lines_of_repeated_steps_are_dropped_and_torn_ones_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 6)) + '{"step": 6, "l')
    assert [r["step"] for r in read_lines(path)] == [1, 2, 3, 4, 5]
    keep_lines_up_to(path, 3)
    assert [r["step"] for r in read_lines(path)] == [1, 2, 3]


def test_a_tail_gives_whole_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.records() == []
    path.write_text('{"a": 1}\n{"a"')
    assert tail.records() == [{"a": 1}]
    with path.open("a") as file:
        file.write(": 2}\n")
    assert tail.records() == [{"a": 2}]
    path.write_text('{"a": 3}\n')
    assert tail.records() == [{"a": 3}]


@pytest.fixture
def state(two: Runs, tmp_path: Path) -> Path:
    """A copy of a run's checkpoints: step 4 and step 8, say."""
    shutil.copytree(two.folder("fp32-2").state, tmp_path / "state")
    newest = next((tmp_path / "state").glob("step-*"))
    shutil.copytree(newest, tmp_path / "state" / "step-00000001")
    return tmp_path / "state"


@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "index cut", "no index", "format"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(state: Path, how: str) -> None:
    good = state / "step-00000001"
    newest = max(state.glob("step-*"))
    assert checkpoint.newest(state) == (newest, [])
    tensors, index = next(newest.glob("*.safetensors")), newest / "index.json"
    if how == "cut":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif how == "flipped":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif how == "missing":
        tensors.unlink()
    elif how == "index cut":
        os.truncate(index, index.stat().st_size // 2)
    elif how == "no index":
        index.unlink()
    else:
        index.write_text(index.read_text().replace('"format": 1', '"format": 99'))
    home, warnings = checkpoint.newest(state)
    assert home == good
    assert len(warnings) == 1
    assert f"{newest} is damaged" in warnings[0]


def test_a_half_written_checkpoint_is_not_seen(state: Path) -> None:
    newest = max(state.glob("step-*"))
    newest.rename(state / ".writing-step-00000009")
    assert checkpoint.newest(state) == (state / "step-00000001", [])


def test_progress_on_a_pipe_is_plain_lines() -> None:
    console = Console(record=True, width=120, force_terminal=False)
    with Screen("2_stage", console) as screen:
        screen.event({"phase": "starting DeepSpeed"})
        screen.event({"phase": "training", "step": 10, "steps": 110})
        screen.metric({"step": 10, "steps": 110, "seconds": 9.0, "tokens": 1000, "loss": 3.25})
        screen.metric({"step": 11, "steps": 110, "seconds": 2.0, "tokens": 1000, "loss": 3.25})
        screen._printed -= 100
        screen.tick()
        screen.tick()
    lines = console.export_text().splitlines()
    assert lines[:2] == ["2_stage: starting DeepSpeed", "2_stage: training"]
    expected = "2_stage: step 11/110  loss 3.250  500 tokens/s  3 min 18 s left"
    assert lines[2:] == [expected]


def test_progress_on_a_terminal_is_a_bar() -> None:
    console = Console(record=True, width=120, force_terminal=True)
    with Screen("2_stage", console) as screen:
        screen.event({"phase": "planning"})
        console.print(screen._picture())
        screen.event({"phase": "training", "steps": 4})
        screen.metric({"step": 1, "steps": 4, "seconds": 2.0, "tokens": 1000, "loss": 3.25})
        console.print(screen._picture())
        screen.event({"activity": "saving a checkpoint"})
        console.print(screen._picture())
    text = console.export_text()
    assert "2_stage: planning …" in text
    assert "1/4" in text
    assert "6 s left" in text
    assert "saving a checkpoint" in text


def test_durations_are_said_as_people_do() -> None:
    assert [duration(s) for s in (0.4, 59, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]


def test_the_first_failing_worker_is_the_one_people_see(tmp_path: Path) -> None:
    Control(1, tmp_path).fail(ValueError("data.sources: the shard is gone"))
    Control(0, tmp_path).fail(RuntimeError("Connection closed by peer"))
    told = json.loads((tmp_path / "error.json").read_text())
    assert told == {"rank": 1, "message": "data.sources: the shard is gone"}


def test_the_channel_of_a_killed_command_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = tmp_path / "channel"
    channel.mkdir()
    monkeypatch.setenv("MLLM_PARENT", parent_mark())
    Control(0, channel).leave()
    assert channel.exists()
    monkeypatch.setenv("MLLM_PARENT", parent_mark().split(":")[0] + ":12.5")
    Control(0, channel).leave()
    assert not channel.exists()


def test_an_output_that_is_a_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ValueError, match="is a file; give the name of a folder"):
        RunFolder(path).check_same({})


def test_a_key_that_recipes_did_not_have_then_counts_as_its_default(tmp_path: Path) -> None:
    recipe = load(tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe(tmp_path, tmp_path / "out")))
    identity = recipe.identity()
    folder = RunFolder(tmp_path / "out")
    before = {key: value for key, value in identity.items() if key != "data.window"}
    folder.begin(recipe, {"identity": before})
    folder.check_same(identity)
    for key, value in (("data.window", 3), ("run.seed", 7)):
        with pytest.raises(ValueError, match=f"{key}: was "):
            folder.check_same(identity | {key: value})


def test_errors_are_said_as_people_need_them() -> None:
    assert message(ValueError("a mistake")) == "a mistake"
    assert message(KeyError("x")) == "KeyError: 'x'"
    assert message(RuntimeError()) == "RuntimeError"


def test_a_worker_knows_whether_its_command_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLLM_PARENT", raising=False)
    assert parent_lives()
    mark = parent_mark()
    monkeypatch.setenv("MLLM_PARENT", mark)
    assert parent_lives()
    monkeypatch.setenv("MLLM_PARENT", mark.split(":")[0] + ":12.5")
    assert not parent_lives()
