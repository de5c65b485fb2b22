"""A Slurm cluster of two nodes on this machine, for tests: a controller and two daemons."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mllm.training.processes import free_port

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/controller.pid
SlurmdLogFile={folder}/%n.log
SlurmctldLogFile={folder}/controller.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 Port={first} CPUs=8
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=8
PartitionName=all Nodes=ALL Default=YES State=UP
"""
PATIENCE = 60.0  # seconds until both nodes are ready


def missing() -> str:
    """What of Slurm is not installed here, "" when all is."""
    names = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
    return ", ".join(name for name in names if shutil.which(name) is None)


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Start it, and end it. Yields the environment in which Slurm's commands find it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds sockets
    controller = Path(shutil.which("slurmctld") or "").resolve()
    values = {"host": socket.gethostname().split(".")[0], "user": os.environ.get("USER", "root")}
    ports = {name: free_port() for name in ("port", "first", "second")}
    text = CONFIGURATION.format(folder=folder, **values, **ports)
    plugins = next(controller.parents[1].glob("lib/*/slurm*"), None)
    if plugins is not None:
        text += f"PluginDir={plugins}\n"
    for name in ("state", f"spool-{values['host']}", f"spool-{values['host']}-2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons = [[str(controller), "-D"]]
    step = next(controller.parent.glob("slurmstepd*"), None)
    for node in (values["host"], f"{values['host']}-2"):
        command = [str(shutil.which("slurmd")), "-D", "-N", node]
        daemons.append(command if step is None else [*command, "-d", str(step)])
    started = []
    try:
        for command in daemons:
            started.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        _wait(environment)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        command = ["sinfo", "--noheader", "--format", "%t %D"]
        states = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        if states.split() == ["idle", "2"]:
            return
        time.sleep(0.5)
    raise AssertionError(f"Slurm's nodes are not ready: {states}")
