"""Compile DeepSpeed's communication op before anything waits for it.

    python -m scripts.quickstart.warm

On a CPU, DeepSpeed reduces through shared memory with a small C++ op that is compiled on first use,
for about a minute. Done here once, it is loaded from the cache afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from mllm.training.comm_op import compiled
from mllm.training.ranks import gpu_count
from scripts.quickstart.console import Advance, bar, warn
from scripts.quickstart.downloads import ended

__all__ = ["warm"]

USUAL_SECONDS = 60
_COMPILE = "from mllm.training.comm_op import ensure; ensure(print)"


def warm() -> bool:
    """Compile the op unless it is there; whether it can be used. Never fatal: gloo goes without."""
    if gpu_count() or compiled():
        return True
    with bar("Compiling DeepSpeed's communication op (once, about a minute)") as advance:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMPILE],
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with ended(process), _ticking(advance):
            output, _ = process.communicate()
    if process.returncode != 0:
        lines = "\n    ".join(output.strip().splitlines()[-5:])
        warn(f"DeepSpeed's op did not compile; training goes on without it.\n    {lines}")
    return process.returncode == 0


class _ticking:
    """Move a bar by the clock while the block runs."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _tick(self) -> None:
        started = time.monotonic()
        while not self._done.wait(0.5):
            self._advance(min(USUAL_SECONDS, int(time.monotonic() - started)), USUAL_SECONDS)


if __name__ == "__main__":
    warm()
