"""Which rank a process is, whichever launcher started it. Nothing here imports torch.

`deepspeed` and `torchrun` say it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
`srun` says it in variables of its own, from which those are made here. A process that no launcher
started is the only rank.
"""

from __future__ import annotations

import re
import socket
from collections.abc import MutableMapping

Environment = MutableMapping[str, str]
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, PORTS = 20_000, 20_000
"""Where the ports lie that are made of Slurm's job numbers."""


def place(environment: Environment) -> int:
    """Complete the variables that torch and DeepSpeed read. Returns this process's rank.

    Raises:
        ValueError: a launcher said only part of it, or the processes of a Slurm job were not
            started by srun.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        missing = [name for name in RENDEZVOUS if name not in environment]
        if missing:
            raise ValueError(
                f"RANK or WORLD_SIZE is set and {', '.join(missing)} is not: start the training "
                "with mllm train, deepspeed, torchrun or srun, or set all of them"
            )
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        _from_slurm(environment)
    elif int(environment.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError(
            f"this Slurm job has {environment['SLURM_NTASKS']} tasks and srun did not start this "
            "process: put srun before the command (scripts/slurm.sh does)"
        )
    else:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(free_port()))
    if "LOCAL_WORLD_SIZE" in environment:  # DeepSpeed's launcher and its op for CPUs call it so
        environment.setdefault("LOCAL_SIZE", environment["LOCAL_WORLD_SIZE"])
    return int(environment["RANK"])


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _from_slurm(environment: Environment) -> None:
    """srun's variables (man srun, "output environment variables") as torch names them."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1"))
    per_node = tasks_per_node(
        environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_NTASKS"])
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    alone = len(visible) == 1 and visible != [""]  # --gpus-per-task: every process sees its own
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"]),
        LOCAL_RANK="0" if alone else environment.get("SLURM_LOCALID", "0"),
        LOCAL_WORLD_SIZE=str(per_node[int(environment.get("SLURM_NODEID", "0"))]),
    )
    if "SLURM_CPUS_PER_TASK" in environment:
        environment.setdefault("OMP_NUM_THREADS", environment["SLURM_CPUS_PER_TASK"])
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (7 * job + step) % PORTS))


def first_host(nodes: str) -> str:
    """The first host of Slurm's short form of a list: `gpu[07-09,12],login` begins with gpu07."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's short form of numbers, a node each: `4(x2),3` is [4, 4, 3]."""
    numbers: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        numbers += [int(count)] * int(times.rstrip(")") or 1)
    return numbers
