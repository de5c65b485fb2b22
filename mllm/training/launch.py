"""What `mllm train` does: it starts `deepspeed`, shows what the workers do, and cleans up.

The workers run in a session of their own, so that Ctrl-C reaches this process alone: it asks them
to finish the step, save and leave. A second Ctrl-C ends them at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from data_packing.wording import counted
from mllm.recipe import Recipe, load_all
from mllm.training.control import CONTROL, ERROR, EVENTS, PARENT, SIGNALS, STOP, parent_mark
from mllm.training.processes import free_port
from mllm.training.progress import Screen, complain, duration
from mllm.training.ranks import Ranks
from mllm.training.run_folder import Lock, NoSpace, RunFolder, full_disk_is_clear
from mllm.training.sources import check_models, parent_id, shards

STOPPED = 130
POLL_SECONDS = 0.2
LOG_LINES = 15
LOCK_SECONDS = 5.0
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""For glibc on processors: activations keep their pages from step to step. Handing them back and
taking them anew was a fifth of the time of a step on a page of 1,024 tokens."""
CHANNEL = ".control-"
"""Begins the name of the channel's folder where it lies in the stage's."""
PORTS = 3
"""How many ports are tried."""


def train(
    path: Path, overrides: Sequence[str], ranks: Ranks, console: Console | None = None
) -> int:
    """Run a recipe, or every recipe of a folder. Returns the exit status.

    Raises:
        ValueError: for everything that can be refused before a worker starts.
    """
    stages = load_all(path, overrides)
    check_models([recipe for _, recipe in stages])
    for file, recipe in stages:
        status = train_stage(file, overrides, recipe, ranks, console)
        if status:
            return status
    return 0


def train_stage(
    file: Path,
    overrides: Sequence[str],
    recipe: Recipe,
    ranks: Ranks,
    console: Console | None = None,
) -> int:
    """Run one stage, unless it is finished. Returns 0, 130 when it was stopped, else 1."""
    folder = RunFolder(recipe.output)
    shards(recipe)
    identity = recipe.identity() | {"model.parent": parent_id(recipe)}
    folder.check_same(json.loads(json.dumps(identity)))
    screen = Screen(file.stem, console)
    finished = folder.finished()
    if finished is not None:
        screen.note(f"already finished ({counted(finished['steps'], 'step')}), in {folder.path}")
        return 0
    with full_disk_is_clear(folder.path), locked(folder):
        return Launch(file, overrides, folder, ranks, screen).run()


@contextlib.contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keep other runs out of a folder.

    Raises:
        ValueError: when another run is writing there.
    """
    lock, workers = Lock(folder.path / "lock"), Lock(folder.path / "worker.lock")
    for other in (lock, workers):
        if not _acquired(other):
            lock.release()
            raise ValueError(
                f"{folder.path}: another run is writing there (process {other.holder()}); wait "
                "for it, or give another run.output"
            )
    workers.release()
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: Lock) -> bool:
    """Take a lock; a process that was killed this moment gives its own back a little later."""
    deadline = time.monotonic() + LOCK_SECONDS
    while not lock.acquire():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


@dataclass(slots=True)
class Tail:
    """Reads the whole lines that are added to a file."""

    path: Path
    offset: int = 0

    def records(self) -> list[dict[str, Any]]:
        """What was added since the last call."""
        found = []
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() < self.offset:  # the workers dropped the lines of repeated steps
                self.offset = 0
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                with contextlib.suppress(json.JSONDecodeError):
                    found.append(json.loads(line))
        return found


@dataclass(slots=True)
class Launch:
    """One start of the workers.

    Attributes:
        file, overrides: what the workers read again.
        screen: where it is shown.
        log_start: where this launch begins in the log.
        began: whether the workers make steps, or did.
    """

    file: Path
    overrides: Sequence[str]
    folder: RunFolder
    ranks: Ranks
    screen: Screen
    log_start: int = 0
    began: bool = False
    interrupts: int = 0
    done: dict[str, Any] | None = None

    def run(self) -> int:
        """Start, watch, clean up. Returns the exit status."""
        control = self._channel()
        previous = {number: signal.signal(number, self._interrupt) for number in SIGNALS}
        process: subprocess.Popen[bytes] | None = None
        try:
            with self._log() as log, self.screen:
                for _ in range(PORTS):
                    (control / ERROR).unlink(missing_ok=True)
                    process = self._start(control, log)
                    self._watch(process, control)
                    if "EADDRINUSE" not in (self._error(control) or ""):
                        break
                    end_session(process)  # somebody took the port before the workers did
            assert process is not None
            return self._outcome(process, control)
        finally:
            if process is not None:
                end_session(process)
            for number, handler in previous.items():
                signal.signal(number, handler)
            shutil.rmtree(control, ignore_errors=True)

    def _channel(self) -> Path:
        """The folder for what is told to workers and by them; other machines must see it too."""
        if self.ranks.hostfile is None:
            return Path(tempfile.mkdtemp(prefix="mllm-"))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        for old in self.folder.path.glob(f"{CHANNEL}*"):  # of a command that was killed
            shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=CHANNEL, dir=self.folder.path)).resolve()

    def _log(self) -> IO[bytes]:
        self.folder.path.mkdir(parents=True, exist_ok=True)
        log = self.folder.log.open("ab")
        self.log_start = log.tell()
        return log

    def _start(self, control: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = os.environ | {CONTROL: str(control), PARENT: parent_mark()}
        environment["PYTHONUNBUFFERED"] = "1"
        # ninja, which compiles DeepSpeed's op, lies beside this environment's python
        here = os.path.dirname(sys.executable)
        environment["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
        if not self.ranks.gpus:  # a host file's workers take what their machine has
            cores = max(1, len(os.sched_getaffinity(0)) // self.ranks.count)
            environment["DS_ACCELERATOR"] = "cpu"
            environment.setdefault("OMP_NUM_THREADS", str(cores))
            for name, value in KEEP_MEMORY.items():
                environment.setdefault(name, value)
        # --num_gpus counts workers, on processors too; the port is free at this moment
        where = ["--num_gpus", str(self.ranks.count), "--master_addr", "127.0.0.1"]
        if self.ranks.hostfile is not None:
            where = ["--hostfile", str(self.ranks.hostfile), "--force_multi"]
        command = [*launcher(), *where, "--master_port", str(free_port())]
        command += ["--module", "mllm.training.worker", "--control", str(control)]
        command += [str(self.file), *self.overrides]
        self.screen.event({"phase": f"starting {counted(self.ranks.count, 'worker')}"})
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _watch(self, process: subprocess.Popen[bytes], control: Path) -> None:
        events = Tail(control / EVENTS)
        metrics = Tail(self.folder.metrics)
        metrics.records()  # what an earlier part of the run wrote
        asked = False
        while True:
            ended = process.poll() is not None
            for event in events.records():
                if "done" in event:
                    self.done = event
                self.began = self.began or event.get("phase") == "training"
                self.screen.event(event)
            for record in metrics.records():
                self.screen.metric(record)
            if ended:
                return
            if self.interrupts and not self.began:
                return  # nothing to save yet
            if self.interrupts and not asked:
                asked = True
                (control / STOP).touch()
                self.screen.note("stopping: the workers finish this step and save")
            if self.interrupts > 1:
                self.screen.note("ending the workers at once")
                return
            self.screen.tick()
            time.sleep(POLL_SECONDS)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupts += 1

    def _outcome(self, process: subprocess.Popen[bytes], control: Path) -> int:
        if self.interrupts > 1 or (self.interrupts and self.done is None):
            self.screen.note("stopped; what was saved is kept, the same command goes on")
            return STOPPED
        error = self._killed() or self._error(control)
        if self.done is None or error is not None or process.returncode:
            complain(error or self._unexplained(process.returncode))
            return 1
        if self.done["done"] == "stopped":
            self.screen.note(
                f"stopped and saved at step {self.done['step']}; the same command goes on there"
            )
            return STOPPED
        finished = self.folder.finished() or {}
        seconds = float(finished.get("seconds", 0.0))
        self.screen.note(
            f"finished: {counted(finished.get('steps', 0), 'step')}, "
            f"{finished.get('tokens', 0):,} useful tokens in {duration(seconds)}, "
            f"saved in {self.folder.path}"
        )
        return 0

    @staticmethod
    def _error(control: Path) -> str | None:
        with contextlib.suppress(OSError, json.JSONDecodeError):
            return str(json.loads((control / ERROR).read_text())["message"])
        return None

    def _unexplained(self, status: int | None) -> str:
        """A worker died without a word."""
        text = f"the workers ended with status {status} and no message"
        return "\n".join([f"{text}. The end of {self.folder.log}:", *self._last_lines()])

    def _killed(self) -> str | None:
        """Said when a worker was killed: what the others report then is a lost connection."""
        if self.done is None and any("return code = -9" in line for line in self._last_lines()):
            return (
                "a worker was killed (signal 9); most often the machine ran out of memory: "
                f"lower data.packing.tokens or use fewer ranks. Log: {self.folder.log}"
            )
        return None

    def _last_lines(self) -> list[str]:
        """The end of what this launch has logged."""
        with contextlib.suppress(OSError), self.folder.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        return []


def launcher() -> list[str]:
    """The `deepspeed` command of this environment, by its module."""
    return [sys.executable, "-m", "deepspeed.launcher.runner"]


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End everything that was started with the workers, loaders and compilers included."""
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            process.poll()
            time.sleep(0.1)


__all__ = ["NoSpace", "train", "train_stage"]
