"""`mllm train` as people use it: stopped, killed, started twice, on a full disk, with mistakes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from mllm.recipe import load
from mllm.training import checkpoint_index as checkpoint
from mllm.training.control import PARENT
from mllm.training.launch import train, train_stage
from mllm.training.ranks import Ranks, gpu_count
from mllm.training.run_folder import RunFolder, read_lines
from mllm.training.sources import check_models
from tests.training import tiny
from tests.training.conftest import LONG, ROOT, Runs, writer

COMMAND = "import sys; sys.argv[0] = 'mllm'; from mllm.cli import main; main()"
PATIENCE = 280.0  # seconds that one command may take on a loaded machine
pytestmark = pytest.mark.timeout(900)  # several commands in a test


def start(*arguments: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """The `mllm` command on two ranks."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=before,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a command; nothing it started is left. Returns what it printed."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert left_over(process.pid) == []
    return output


def left_over(parent: int) -> list[str]:
    """Processes that a command started and that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(PARENT, "").startswith(f"{parent}:"):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def wait_for_step(folder: RunFolder, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has made so many steps."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        records = read_lines(folder.metrics)
        if records and records[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def kill_everything(process: subprocess.Popen[str]) -> None:
    """kill -9 of the command and all that it started, at once."""
    parent = psutil.Process(process.pid)
    for victim in [parent, *parent.children(recursive=True)]:
        victim.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while left_over(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_over(process.pid) == []


def kills(home: Path, two: Runs, tmp_path: Path, steps: list[int]) -> None:
    """Kill a run at these steps, damage the newest checkpoint after the last, and compare."""
    runs = Runs(tmp_path)
    recipe = writer(home, runs)("long", **LONG)
    folder = runs.folder("long")
    for step in steps:
        process = start("train", recipe, "--cpus", "2")
        wait_for_step(folder, step, process)
        kill_everything(process)
        assert folder.finished() is None
    newest, _ = checkpoint.newest(folder.state)
    assert newest is not None
    torn = next(iter(newest.glob("*.safetensors")))
    os.truncate(torn, torn.stat().st_size - 100)
    process = start("train", recipe, "--cpus", "2")
    output = finish(process)
    assert process.returncode == 0, output
    assert f"{newest.name} is damaged" in output
    assert "going on from step" in output
    assert runs.losses("long") == two.losses("long")
    expected, got = two.weights("long"), runs.weights("long")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_killed_twice_and_torn_it_ends_bit_identical(home: Path, two: Runs, tmp_path: Path) -> None:
    kills(home, two, tmp_path, [9, 22])


KILLS = 20
LATEST = {"step": 0.2, "save": 0.01, "loader": 0.5, "start": 8.0}
"""Where a kill may fall, and how many seconds after that it comes at the latest."""
HUNDRED: dict[str, Any] = {
    "run__epochs": None,
    "run__tokens": 100 * 256,
    "run__checkpoint_every": 3,
    "run__zero": 3,
    "data__workers": 1,
    "train__language_model": {"lr": 1e-2, "lora": {"rank": 4, "dropout": 0.1}},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments_it_ends_bit_identical(home: Path, tmp_path: Path) -> None:
    """Five kills each: in a step, in a save, when the loader has begun, and at the start."""
    runs, random = Runs(tmp_path), Random(0)
    write = writer(home, runs)
    whole = start("train", write("whole", **HUNDRED), "--cpus", "2")
    recipe, folder = write("killed", **HUNDRED), runs.folder("killed")
    output = finish(whole)
    assert whole.returncode == 0, output
    steps = iter(sorted(random.sample(range(1, 70), KILLS // 2)))
    moments = [moment for moment in LATEST for _ in range(KILLS // len(LATEST))]
    random.shuffle(moments)
    hit = Counter[str]()
    for moment in moments:
        process = start("train", recipe, "--cpus", "2")
        if moment in ("step", "save"):
            wait_for_step(folder, next(steps), process)
        if moment == "save":
            wait_until(lambda: any(folder.state.glob(".writing-*")), process)
        elif moment == "loader":
            wait_until(partial(has_loader, process.pid), process)
        time.sleep(random.uniform(0, LATEST[moment]))
        kill_everything(process)
        hit["in a save"] += any(folder.state.glob(".writing-*"))
        assert folder.finished() is None
        assert all(checkpoint.damage(home) is None for home in checkpoint.homes(folder.state))
    assert hit["in a save"] > 0, "no kill fell into a save"
    process = start("train", recipe, "--cpus", "2")
    output = finish(process)
    assert process.returncode == 0, output
    assert not list(folder.state.glob(".writing-*"))
    assert runs.losses("killed") == runs.losses("whole")
    for read in (runs.weights, runs.state):
        expected, got = read("whole"), read("killed")
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that the run does."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def has_loader(parent: int) -> bool:
    """Whether a loader's process runs."""
    try:
        children = psutil.Process(parent).children(recursive=True)
        return any("data_packing.loader" in " ".join(child.cmdline()) for child in children)
    except psutil.Error:
        return False


def test_stopped_locked_and_out_of_space(home: Path, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    recipe = writer(home, runs)("long", **(LONG | {"run__epochs": 100}))
    folder = runs.folder("long")
    process = start("train", recipe, "--cpus", "2")
    wait_for_step(folder, 6, process)

    second = start("train", recipe, "--cpus", "2")
    refusal, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 2
    assert "another run is writing there" in refusal
    assert process.poll() is None

    process.send_signal(signal.SIGUSR1)  # as Slurm sends; Ctrl-C and SIGTERM do the same
    output = finish(process)
    assert process.returncode == 130, output
    assert "stopped and saved at step" in output
    kept, warnings = checkpoint.newest(folder.state)
    assert kept is not None
    assert warnings == []
    reached = len(runs.losses("long"))
    assert checkpoint.read_state(kept).step == reached

    folder.log.unlink()
    limit = 50_000  # bytes in a file: a checkpoint's are larger
    process = start(
        "train",
        recipe,
        "--cpus",
        "2",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    output = finish(process)
    assert process.returncode == 1, output
    assert "no space left for" in output
    assert "run the same command again" in output
    assert "Traceback" not in output
    again, warnings = checkpoint.newest(folder.state)
    assert again == kept
    assert warnings == []
    assert not list(folder.state.glob(".writing-*"))


def test_stopped_before_the_first_step_it_leaves_at_once(home: Path, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    recipe = writer(home, runs)("early", **LONG)
    log = runs.folder("early").log
    process = start("train", recipe, "--cpus", "2")
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    assert "stopping: the workers finish" not in output
    assert not runs.folder("early").metrics.exists()


def test_too_many_broken_documents_stop_the_run_until_it_may_lose_more(
    home: Path, tmp_path: Path
) -> None:
    runs = Runs(tmp_path)
    recipe = writer(home, runs)(
        "broken", data__sources=[{"path": str(home / "data" / "broken-*.tar")}]
    )
    process = start("train", recipe, "data.max_refused=0", "--cpus", "2")
    output = finish(process)
    assert process.returncode == 1, output
    assert "more than data.max_refused (0.0%) allows" in output
    assert f"broken, {tiny.BROKEN_KEY}" in output
    assert "truncated" in output
    small = {"data__packing": {"tokens": 24}, "run__tokens_per_step": 240}
    process = start("train", writer(home, runs)("small", **small), "--cpus", "2")
    output = finish(process)
    assert process.returncode == 1, output
    assert "a pack holds 24" in output
    assert not runs.folder("small").metrics.exists()
    process = start("train", recipe, "data.max_refused=0.2", "--cpus", "2")
    output = finish(process)
    assert process.returncode == 0, output


def test_a_workers_own_message_is_shown(home: Path, tmp_path: Path) -> None:
    recipe = writer(home, Runs(tmp_path))(
        "wrong", train__language_model={"lr": 1e-3, "lora": {"rank": 2, "targets": ["q_prj"]}}
    )
    process = start("train", recipe, "--cpus", "2")
    output = finish(process)
    assert process.returncode == 1
    message = output.split("mllm: ")[-1]
    assert "'q_prj' is no linear layer" in message
    assert "did you mean 'q_proj'?" in message
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_a_word(home: Path, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    recipe = writer(home, runs)("long", **(LONG | {"run__epochs": 100}))
    process = start("train", recipe, "--cpus", "2")
    wait_for_step(runs.folder("long"), 4, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "mllm.training.worker" in child.cmdline() and child.environ().get("RANK") == "1"
    ]
    port = workers[-1].environ()["MASTER_PORT"]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # gone before any kill
    workers[-1].kill()
    output = finish(process)
    assert process.returncode == 1
    assert "a worker was killed" in output


@pytest.mark.slow
def test_workers_leave_when_the_command_is_killed(home: Path, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    recipe = writer(home, runs)("long", **(LONG | {"run__epochs": 100}))
    process = start("train", recipe, "--cpus", "2")
    wait_for_step(runs.folder("long"), 4, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while left_over(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_over(process.pid) == []
    kept, _ = checkpoint.newest(runs.folder("long").state)
    assert kept is not None
    assert checkpoint.read_state(kept).step == len(runs.losses("long"))


def quick(file: Path, *overrides: str) -> tuple[int, str]:
    """`train_stage` where it ends before a worker starts. Returns status and output."""
    console = Console(record=True, width=200, force_terminal=False)
    recipe = load(file, overrides)
    status = train_stage(file, overrides, recipe, Ranks(2, gpus=False), console)
    return status, console.export_text()


def test_a_finished_stage_is_left_alone(two: Runs) -> None:
    before = two.folder("fp32-2").marker.stat().st_mtime_ns
    status, output = quick(two.path / "fp32-2.yaml", "data.workers=3", "run.zero=3")
    assert status == 0
    assert "already finished (5 steps)" in output
    assert two.folder("fp32-2").marker.stat().st_mtime_ns == before


def test_a_finished_stage_with_another_recipe_is_refused(two: Runs) -> None:
    with pytest.raises(ValueError, match=r"finished with another recipe") as refusal:
        quick(two.path / "fp32-2.yaml", "optimizer.warmup=0.2")
    assert "optimizer.warmup: was 0.1, is now 0.2" in str(refusal.value)
    assert "delete" in str(refusal.value)


def stage_after(home: Path, parent: Path, path: Path) -> Path:
    """A recipe that starts from another stage."""
    values: dict[str, Any] = tiny.recipe(home, path / "after")
    values["model"] = {"from": str(parent)}
    return tiny.write_recipe(path / "after.yaml", values)


def test_a_stage_does_not_start_from_an_unfinished_one(
    home: Path, two: Runs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"has not finished"):
        quick(stage_after(home, two.path / "hop", tmp_path))


def test_missing_shards_are_refused_before_a_worker_starts(home: Path, tmp_path: Path) -> None:
    values = tiny.recipe(home, tmp_path / "out", data__sources=[{"path": str(home / "no-*.tar")}])
    with pytest.raises(ValueError, match=r"data.sources.0.path: no shard matches"):
        quick(tiny.write_recipe(tmp_path / "r.yaml", values))


def test_models_that_are_not_there_are_refused_before_anything_is_written(
    home: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"model.from: there is no folder .*nowhere"):
        check_models([load(stage_after(home, tmp_path / "nowhere", tmp_path))])
    first = tmp_path / "1.yaml"
    for part in ("encoder", "language_model"):
        values = tiny.recipe(home, tmp_path / "first")
        values["model"][part]["path"] = str(tmp_path / "gone")
        with pytest.raises(ValueError, match=rf"model.{part}.path: there is no folder"):
            train(tiny.write_recipe(first, values), [], Ranks(1, gpus=False))
    values = tiny.recipe(home, tmp_path / "first")
    gone = {"name": "clip", "path": str(tmp_path / "gone")}
    values["model"]["encoder"] = {
        "name": "pair",
        "first": values["model"]["encoder"],
        "second": gone,
    }
    with pytest.raises(ValueError, match=r"model.encoder.second.path: there is no folder"):
        train(tiny.write_recipe(first, values), [], Ranks(1, gpus=False))
    assert not (tmp_path / "first").exists()
    good = load(tiny.write_recipe(first, tiny.recipe(home, tmp_path / "first")))
    check_models([good, load(stage_after(home, tmp_path / "first", tmp_path))])


def test_visible_devices_choose_among_gpus_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu_count() == 0  # no nvidia-smi
    listing = "".join(f"echo 'GPU {i}: a card'\n" for i in range(4))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{listing}")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for visible, count in (("0", 1), ("1,3", 2), ("", 0), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu_count() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_count() == 4


def test_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="this machine has"):
        Ranks.choose(gpus=1000, cpus=None)
    with pytest.raises(ValueError, match="one of --gpus, --cpus and --hostfile"):
        Ranks.choose(gpus=1, cpus=1)
