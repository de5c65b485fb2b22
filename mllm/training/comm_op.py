"""DeepSpeed's communication op for CPUs is compiled the first time it is used, for about a minute.

Here it is compiled by one process at a time, under a lock that cannot go stale, and a lock file
that a killed compilation left behind (torch waits for it forever) is removed.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

COMPILING = "compiling DeepSpeed's communication op, about a minute, once"


def ensure(tell: Callable[[str], None]) -> None:
    """Compile the op if this machine has not yet.

    Args:
        tell: called with a line for people before it takes long.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builder = ShareMemCommBuilder()
    home = _build_folder(builder.name)
    home.mkdir(parents=True, exist_ok=True)
    with (home.parent / f".{builder.name}.building").open("w") as lock:
        if not list(home.glob("*.so")):
            tell(COMPILING)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (home / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def _build_folder(name: str) -> Path:
    """Where torch's extension loader builds an op."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, False))
