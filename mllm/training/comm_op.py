"""DeepSpeed's communication op for CPUs is compiled the first time it is used, for about a minute.

Here it is compiled by one process at a time, under a lock that cannot go stale, in a folder of this
environment's own (two environments that share one would compile it anew in turns), and a lock file
that a killed compilation left behind (torch waits for it forever) is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

COMPILING = "compiling DeepSpeed's communication op, about a minute, once"
NAME = "deepspeed_shm_comm"
EXTENSIONS = "TORCH_EXTENSIONS_DIR"


def ensure(tell: Callable[[str], None]) -> None:
    """Compile the op if this environment has not yet. Sets TORCH_EXTENSIONS_DIR unless it is set.

    Args:
        tell: called with a line for people before it takes long.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    home = folder()
    os.environ[EXTENSIONS] = str(home.parent)
    # Another ninja does not know what this one built and builds it again: take this environment's.
    here = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
    home.mkdir(parents=True, exist_ok=True)
    with (home.parent / f".{NAME}.building").open("w") as lock:
        if not compiled():
            tell(COMPILING)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (home / "lock").unlink(missing_ok=True)
        ShareMemCommBuilder().load(verbose=False)


def compiled() -> bool:
    """Whether this environment has the op."""
    return (folder() / f"{NAME}.so").is_file()


def folder() -> Path:
    """Where the op is built: one folder per environment."""
    given = os.environ.get(EXTENSIONS)
    if given:
        return Path(given) / NAME
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch_extensions"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return cache / f"{python}_cpu_{environment}" / NAME


def forget_buffer(rank: int) -> None:
    """Remove the name of this rank's shared memory; the memory goes when the last process ends.

    DeepSpeed never does, so 66 MiB a rank would stay in /dev/shm after every run. Call it when all
    ranks have opened each other's.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)
