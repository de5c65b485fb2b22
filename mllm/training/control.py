"""What workers and the command that started them tell each other.

The command gives the workers a folder, through `MLLM_CONTROL` or on their command line: rank 0
writes its phases there, a worker that fails its error, and the command a request to stop. Without
it (workers started by `deepspeed`, `torchrun` or `srun` directly) rank 0 prints plain lines and
errors go to the screen.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from mllm.training.progress import Screen, complain
from mllm.training.run_folder import NoSpace

CONTROL = "MLLM_CONTROL"
PARENT = "MLLM_PARENT"
EVENTS = "events.jsonl"
ERROR = "error.json"
STOP = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each asks for a checkpoint and the end. SIGUSR1 is what Slurm is told to send before the end."""
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "slurmstepd")
"""What the commands of launchers have in them."""
WATCH_SECONDS = 0.5
ALONE_SECONDS = 10.0


class Control:
    """A worker's end.

    Args:
        rank: this worker's.
        folder: shared with the command and the other workers, None when there is no command.
    """

    def __init__(self, rank: int, folder: Path | None) -> None:
        self.rank = rank
        self.folder = folder
        self.title("")
        self._stop = threading.Event()
        self._siblings: list[psutil.Process] = []
        self._failed = False

    @classmethod
    def from_environment(cls, rank: int, folder: Path | None = None) -> Control:
        """The channel that the command opened, if one did; `folder` where it says so itself."""
        given = os.environ.get(CONTROL)
        return cls(rank, folder or (Path(given) if given else None))

    @property
    def heard(self) -> bool:
        """Whether there is a command, which says itself what people should know."""
        return self.folder is not None

    def title(self, name: str) -> None:
        """Begin a stage: its plain lines start with its name when there is no command."""
        self.screen = Screen(name, Console(force_terminal=False, width=1000))

    @property
    def stop_requested(self) -> bool:
        """Whether this worker was asked to save and leave."""
        return self._stop.is_set()

    def watch(self) -> None:
        """Listen for signals, for the command's wishes, its death, and other workers' errors."""
        for number in SIGNALS:
            signal.signal(number, lambda *_: self._stop.set())
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    def meet(self) -> None:
        """Remember the other workers of this machine; call it when all have started.

        A worker whose sibling was killed would wait for it in a collective for ever.
        """
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process().parent()
            if parent is not None and launchers():
                self._siblings = [p for p in parent.children() if p.pid != os.getpid()]

    def part(self) -> None:
        """From here on the other workers may end before this one."""
        self._siblings = []

    def leave(self) -> None:
        """Remove the channel if the command that made it was killed and cannot."""
        if self.folder is not None and not parent_lives():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _alone_since(self, before: float | None) -> float | None:
        """When a sibling was first seen to be gone, None while all are there."""
        if all(alive(sibling) for sibling in self._siblings):
            return None
        return before or time.monotonic()

    def _watch(self) -> None:
        above = launchers()
        alone: float | None = None
        while True:
            time.sleep(WATCH_SECONDS)
            if not parent_lives() or not all(process.is_running() for process in above):
                self._stop.set()
            alone = self._alone_since(alone)
            if alone is not None and time.monotonic() - alone > ALONE_SECONDS:
                complain(f"rank {self.rank}: another worker ended without a word; leaving")
                os._exit(1)
            if self.folder is None:
                continue
            if (self.folder / STOP).exists():
                self._stop.set()
            if not self.folder.exists():
                os._exit(1)  # the command has ended and could not end this worker itself
            if (self.folder / ERROR).exists() and not self._failed:
                time.sleep(2 * WATCH_SECONDS)  # let a rank that fails as well say so in the log
                os._exit(1)

    def event(self, **facts: Any) -> None:
        """Tell people something (rank 0 only; the others are silent)."""
        if self.rank != 0:
            return
        if self.folder is None:
            self.screen.event(facts)
            if "done" in facts:
                self.screen.note(f"{facts['done']} at step {facts.get('step', 'the last')}")
            return
        with contextlib.suppress(OSError), (self.folder / EVENTS).open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def metric(self, record: dict[str, Any]) -> None:
        """A step was made. The command reads it from metrics.jsonl."""
        if self.rank == 0 and self.folder is None:
            self.screen.metric(record)
            self.screen.tick()

    def phase(self, name: str, **facts: Any) -> None:
        """What is happening now, in words for people."""
        self.event(phase=name, **facts)

    def note(self, text: str) -> None:
        """Something people should know."""
        self.event(note=text)

    def fail(self, error: BaseException) -> None:
        """Report this worker's error. The first of all workers is the one that people see."""
        self._failed = True
        record = {"rank": self.rank, "message": message(error)}
        if self.folder is None:
            if not isinstance(error, ValueError | NoSpace):
                traceback.print_exception(error)
            complain(f"rank {self.rank}: {record['message']}")
            return
        traceback.print_exception(error)
        draft = self.folder / f".{ERROR}.{self.rank}"
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(record))
            os.link(draft, self.folder / ERROR)


def message(error: BaseException) -> str:
    """An error as people should see it: what a user did wrong has its whole story in it."""
    if isinstance(error, ValueError | NoSpace):
        return str(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def launchers() -> list[psutil.Process]:
    """The launcher's processes above this one; a worker does not outlive them."""
    above = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if not any(name in part for part in process.cmdline() for name in LAUNCHERS):
                break
            above.append(process)
    return above


def alive(process: psutil.Process) -> bool:
    """Whether a process runs and has not only not been buried yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def parent_mark() -> str:
    """Identifies this process for `parent_lives`: its number and when it started."""
    return f"{os.getpid()}:{psutil.Process().create_time()}"


def parent_lives() -> bool:
    """Whether the command that started the workers still runs."""
    mark = os.environ.get(PARENT)
    if not mark:
        return True
    number, _, started = mark.partition(":")
    try:
        return bool(psutil.Process(int(number)).create_time() == float(started))
    except psutil.Error:
        return False
