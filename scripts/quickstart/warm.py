"""Compile DeepSpeed's communication op before anything waits for it.

    python -m scripts.quickstart.warm

On a CPU, DeepSpeed reduces through shared memory with a small C++ op that is compiled on first use,
for about a minute. Done here once, it is loaded from the cache afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from scripts.quickstart.console import bar, warn
from scripts.quickstart.phases import locked

__all__ = ["warm"]

OP = "deepspeed_shm_comm"
USUAL_SECONDS = 60
_STALE_SECONDS = 900.0
_COMPILE = (
    "from deepspeed.accelerator import get_accelerator as a;"
    "a().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
)


def warm() -> bool:
    """Compile the op unless it is there; whether it can be used. Never fatal: gloo goes without."""
    if shutil.which("nvidia-smi") and os.environ.get("DS_ACCELERATOR") != "cpu":
        return True
    with locked(Path(tempfile.gettempdir()) / f"mllm-warm-{os.getuid()}" / "lock"):
        _remove_stale_locks()
        if _compiled():
            return True
        with bar("Compiling DeepSpeed's communication op (once, about a minute)") as advance:
            done = threading.Event()
            ticker = threading.Thread(target=_tick, args=(done, advance), daemon=True)
            ticker.start()
            try:
                result = subprocess.run(
                    [sys.executable, "-c", _COMPILE],
                    env={**os.environ, "DS_ACCELERATOR": "cpu"},
                    capture_output=True,
                    text=True,
                )
            finally:
                done.set()
                ticker.join()
        if result.returncode != 0:
            lines = "\n    ".join((result.stdout + result.stderr).strip().splitlines()[-5:])
            warn(f"DeepSpeed's op did not compile; training goes on without it.\n    {lines}")
        return result.returncode == 0


def _tick(done: threading.Event, advance: object) -> None:
    started = time.monotonic()
    assert callable(advance)
    while not done.wait(0.5):
        advance(min(USUAL_SECONDS, int(time.monotonic() - started)), USUAL_SECONDS)


def _caches() -> list[Path]:
    """Where torch keeps compiled extensions: one folder per Python and CUDA version."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return [Path(root) / OP]
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch_extensions"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return list(home.glob(f"{python}_*/{OP}"))


def _compiled() -> bool:
    return any((place / f"{OP}.so").is_file() for place in _caches())


def _remove_stale_locks() -> None:
    """A killed compilation leaves a lock file on which every later one would wait for ever."""
    for place in _caches():
        lock = place / "lock"
        if lock.exists() and time.time() - lock.stat().st_mtime > _STALE_SECONDS:
            lock.unlink(missing_ok=True)


if __name__ == "__main__":
    warm()
