"""How many workers a command starts, and where: this machine's GPUs, or those of a host file."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many workers, and on what.

    Attributes:
        count: number of workers, on all machines together.
        gpus: whether each has a GPU; otherwise they share the processor.
        hostfile: names the machines and how many workers each has; None: this one alone.
    """

    count: int
    gpus: bool
    hostfile: Path | None = None

    @classmethod
    def choose(cls, gpus: int | None, cpus: int | None, hostfile: Path | None = None) -> Ranks:
        """What the user asked for, or all GPUs, or one rank per core (at most two).

        Raises:
            ValueError: when two are given, or more GPUs than there are, or no good host file.
        """
        if sum(given is not None for given in (gpus, cpus, hostfile)) > 1:
            raise ValueError("give one of --gpus, --cpus and --hostfile")
        if hostfile is not None:
            return cls(sum(slots(hostfile).values()), gpus=True, hostfile=hostfile)
        if cpus is not None:
            return cls(cpus, gpus=False)
        present = gpu_count()
        if gpus is not None:
            if gpus > present:
                raise ValueError(
                    f"--gpus {gpus}: this machine has {present}; use --cpus N to train without"
                )
            return cls(gpus, gpus=True)
        if present:
            return cls(present, gpus=True)
        return cls(min(2, len(os.sched_getaffinity(0))), gpus=False)


def slots(hostfile: Path) -> dict[str, int]:
    """The workers of every machine that a host file of DeepSpeed names: `host slots=8`.

    Raises:
        ValueError: it cannot be read, a line is something else, or a host comes twice.
    """
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--hostfile {hostfile} cannot be read ({error})") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        host, _, count = text.partition(" slots=")
        if not text:
            continue
        if not count.strip().isdigit() or int(count) < 1:
            raise ValueError(f"{hostfile}:{number}: expected `host slots=N`, found {text!r}")
        if host.strip() in found:
            raise ValueError(f"{hostfile}:{number}: {host.strip()} is named twice")
        found[host.strip()] = int(count)
    if not found:
        raise ValueError(f"--hostfile {hostfile} names no machine; a line is `host slots=8`")
    return found


def gpu_count() -> int:
    """GPUs that may be used here, without importing torch (which takes seconds).

    CUDA_VISIBLE_DEVICES chooses among those that nvidia-smi names; without any it chooses nothing.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = None
    if visible is not None:
        chosen = len([d for d in visible.split(",") if d.strip() not in ("", "-1")])
        if not chosen:
            return 0
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    present = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return present if chosen is None or present == 0 else chosen
