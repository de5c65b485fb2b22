"""On what a figure was measured."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["cpu_seconds", "describe", "versions"]

PACKAGES = ("mllm", "torch", "transformers", "deepspeed", "peft")


def describe() -> str:
    """Processor, cores this process may use, memory, GPUs."""
    name = _cpu_name()
    cores = len(os.sched_getaffinity(0))
    parts = [f"{name}, {cores} core{'s' if cores != 1 else ''}", _memory(), _gpus()]
    return ", ".join(part for part in parts if part)


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_seconds() -> float:
    """CPU time of this process and of those it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def environment() -> dict[str, Any]:
    """Machine and versions together, for a report."""
    return {"machine": describe(), "versions": versions()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in known.items()}
    name = fields.get("model name", platform.machine())
    fast = [f for f in ("avx512_bf16", "amx_bf16") if f in fields.get("flags", "").split()]
    return " with ".join([name, *fast[:1]])


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return ""
    return f"{size / 2**30:.0f} GiB"


def _gpus() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
