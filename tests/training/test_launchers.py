"""Every launcher starts the same training: deepspeed, torchrun, srun, sbatch; one node or two."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mllm.training.checkpoint_index import newest, read_state
from mllm.training.launch import end_session, launcher
from mllm.training.processes import free_port
from mllm.training.ranks import Ranks, slots
from mllm.training.run_folder import read_lines
from tests.training import slurm, tiny
from tests.training.conftest import LONG, ROOT, Runs, writer

SCRIPT = str(ROOT / "scripts" / "train.py")
SAME = 1e-6
PATIENCE = 280.0
pytestmark = pytest.mark.timeout(900)


def stages(home: Path, path: Path) -> Path:
    """A folder of two stages; the second goes on from the first."""
    first, second = tiny.recipe(home, path / "first"), tiny.recipe(home, path / "second")
    second["model"] = {"from": str(path / "first")}
    tiny.write_recipe(path / "recipes" / "1_first.yaml", first)
    tiny.write_recipe(path / "recipes" / "2_second.yaml", second)
    return path / "recipes"


def together(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]
) -> tuple[list[int], str]:
    """Run commands side by side. Returns their exit statuses, and what they printed."""
    processes = []
    for command, more in zip(commands, environments, strict=True):
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | more
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        output = "".join(process.communicate(timeout=PATIENCE)[0] for process in processes)
    finally:
        for process in processes:
            end_session(process)
    return [process.returncode for process in processes], output


def as_srun(rank: int, port: int) -> dict[str, str]:
    """The variables that srun sets for one of two tasks on this machine."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }


def check(two: Runs, path: Path, recipes: Path) -> None:
    """The folder's stages ended as they do with one launcher on one node."""
    runs = Runs(path)
    assert runs.losses("first") == pytest.approx(two.losses("fp32-2"), rel=SAME)
    assert all(runs.folder(name).finished() is not None for name in ("first", "second"))
    assert len(runs.losses("second")) == len(runs.losses("first"))
    assert runs.losses("second")[0] < runs.losses("first")[0]
    assert [file.name for file in sorted(recipes.iterdir())] == ["1_first.yaml", "2_second.yaml"]


def test_tasks_of_srun_train_the_stages_of_a_folder(home: Path, two: Runs, tmp_path: Path) -> None:
    recipes = stages(home, tmp_path)
    command, port = [sys.executable, SCRIPT, str(recipes)], free_port()
    status, output = together([command] * 2, [as_srun(rank, port) for rank in range(2)])
    assert status == [0, 0], output
    check(two, tmp_path, recipes)
    assert output.index("1_first: training") < output.index("2_second: training")
    begun = Runs(tmp_path).folder("second").marker
    before = begun.stat().st_mtime_ns
    status, output = together([command], [{}])  # no launcher: the only rank
    assert status == [0], output
    assert "1_first: already finished (5 steps)" in output
    assert "2_second: already finished (5 steps)" in output
    assert begun.stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_nodes_under_deepspeed(home: Path, two: Runs, tmp_path: Path) -> None:
    recipes = stages(home, tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    shared = ["--hostfile", str(hosts), "--no_ssh", "--num_nodes", "2", "--master_port"]
    shared += [str(free_port()), "--master_addr", "127.0.0.1"]
    nodes = [
        [*launcher(), *shared, "--node_rank", str(node), SCRIPT, str(recipes)] for node in (0, 1)
    ]
    status, output = together(nodes, [{}, {}])
    assert status == [0, 0], output
    check(two, tmp_path, recipes)


@pytest.mark.slow
def test_two_nodes_under_torchrun(home: Path, two: Runs, tmp_path: Path) -> None:
    recipes = stages(home, tmp_path)
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    run += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    nodes = [[*run, "--node-rank", str(node), SCRIPT, str(recipes)] for node in (0, 1)]
    status, output = together(nodes, [{}, {}])
    assert status == [0, 0], output
    check(two, tmp_path, recipes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_launcher_that_is_stopped_lets_its_workers_save(
    home: Path, tmp_path: Path, name: str
) -> None:
    """They signal more processes than the ranks: loaders must outlive that."""
    runs, log = Runs(tmp_path), tmp_path / "log"
    recipe = writer(home, runs)("long", **(LONG | {"run__epochs": 100}), data__workers=1)
    folder, port = runs.folder("long"), str(free_port())
    start = {
        "deepspeed": [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info", WORLD],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
    }[name]
    command = [*start, f"--master_port={port}", SCRIPT, recipe]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            wait_for(lambda: len(read_lines(folder.metrics)) > 5, log)
            process.terminate()
            process.wait(PATIENCE)
        finally:
            end_session(process)
    reached = len(read_lines(folder.metrics))
    assert f"stopped at step {reached}" in log.read_text()
    home_, warnings = newest(folder.state)
    assert home_ is not None
    assert warnings == []
    assert read_state(home_).step == reached


WORLD = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()
"""This machine with two workers, as the deepspeed command tells its per-machine launcher."""


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.missing()), reason=f"not installed: {slurm.missing()}")
def test_slurm_stops_a_job_queues_it_again_and_srun_ends_it(
    home: Path, two: Runs, tmp_path: Path
) -> None:
    runs, log = Runs(tmp_path), tmp_path / "job.log"
    recipe = writer(home, runs)("long", **LONG, data__workers=1)
    folder = runs.folder("long")
    with slurm.cluster() as environment:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}

        def call(*command: str) -> str:
            return subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
            ).stdout

        tasks = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
        batch = ["sbatch", "--parsable", *tasks, "--gpus-per-node=0", f"--output={log}"]
        job = call(*batch, "scripts/slurm.sh", recipe).strip()
        wait_for(lambda: len(read_lines(folder.metrics)) > 5, log)
        call("scancel", "--signal=USR1", job)
        wait_for(lambda: "JobState=PENDING" in call("scontrol", "show", "job", job), log)
        call("scancel", job)
        reached = len(read_lines(folder.metrics))
        assert f"stopped at step {reached}" in log.read_text()
        assert folder.finished() is None
        output = call("srun", "--ntasks=2", *tasks, sys.executable, SCRIPT, recipe)
    assert f"going on from step {reached}" in output
    assert runs.losses("long") == two.losses("long")
    expected, got = two.weights("long"), runs.weights("long")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def wait_for(happened: Callable[[], bool], log: Path) -> None:
    """Wait until it has; the job's log says why it has not."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)


def test_a_host_file_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nworker-0 slots=8\n\nworker-1   slots=4  # a smaller one\n")
    assert slots(hosts) == {"worker-0": 8, "worker-1": 4}
    assert Ranks.choose(None, None, hosts).count == 12
    for text, message in (
        ("worker-0 slot=8\n", r"hosts:1: expected `host slots=N`, found 'worker-0 slot=8'"),
        ("a slots=1\na slots=2\n", "hosts:2: a is named twice"),
        ("a slots=0\n", "hosts:1: expected"),
        ("# nothing\n", "names no machine"),
    ):
        hosts.write_text(text)
        with pytest.raises(ValueError, match=message):
            slots(hosts)
    with pytest.raises(ValueError, match="cannot be read"):
        slots(tmp_path / "gone")
    with pytest.raises(ValueError, match="one of --gpus, --cpus and --hostfile"):
        Ranks.choose(None, 2, hosts)


REMOTE = """#!{python}
import re, shlex, subprocess, sys
arguments = sys.argv[1:]
if {name!r} == "ssh":  # one host and a command
    sys.exit(subprocess.call(["sh", "-c", "echo 127.0.0.1"]))
hosts = arguments[arguments.index("-w") + 1].split(",")
command = " ".join(arguments[arguments.index("-w") + 2 :])
nodes = [
    subprocess.Popen(["sh", "-c", command.replace("%n", str(number)).replace("%h", host)])
    for number, host in enumerate(hosts)
]
sys.exit(max(node.wait() for node in nodes))
"""
"""Stands for ssh and pdsh: runs here what pdsh would run on other machines."""


@pytest.mark.slow
def test_the_command_starts_the_machines_of_a_host_file(
    home: Path, two: Runs, tmp_path: Path
) -> None:
    recipes, hosts, bin_ = stages(home, tmp_path), tmp_path / "hosts", tmp_path / "bin"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    bin_.mkdir()
    for name in ("ssh", "pdsh"):
        (bin_ / name).write_text(REMOTE.format(python=sys.executable, name=name))
        (bin_ / name).chmod(0o755)
    path = os.pathsep.join([str(bin_), os.environ["PATH"]])
    code = "import sys; sys.argv[0] = 'mllm'; from mllm.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(recipes), "--hostfile", str(hosts)]
    status, output = together([command], [{"PATH": path}])
    assert status == [0], output
    assert output.count("finished: 5 steps") == 2, output
    check(two, tmp_path, recipes)
    assert not list((tmp_path / "first").glob(".control-*"))
