"""What a person sees while a stage runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from data_packing.wording import some

PLAIN_SECONDS = 5.0
RECENT = 20
"""Steps over which speed is averaged."""
SMOOTH = 0.1


class Screen:
    """One stage's progress.

    Args:
        title: the stage's name.
        console: where to print; stdout by default.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console()
        self.live = self.console.is_terminal
        self.phase = self.activity = ""
        self.step = self.steps = 0
        self.loss: float | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._made = 0
        self._phase_began = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),  # takes what the facts leave
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task(self.title, total=None, facts="")
            self._live = Live(
                get_renderable=self._picture, console=self.console, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """A line that stays."""
        with contextlib.suppress(OSError):  # nobody reading it any more is no reason to fail
            line = f"{self.title}: {text}" if self.title else text
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def event(self, event: dict[str, Any]) -> None:
        """Something the workers said."""
        if "note" in event:
            self.note(str(event["note"]))
        self.activity = str(event.get("activity", self.activity))
        if "steps" in event:
            self.steps = int(event["steps"])
        if "step" in event:
            self.step = max(self.step, int(event["step"]))
        if "phase" in event and event["phase"] != self.phase:
            self.phase = str(event["phase"])
            self._phase_began = time.monotonic()
            if not self.live:
                self.note(self.phase)
                self._printed = time.monotonic()

    def metric(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._made += 1
        if self._made == 2:
            self._recent.clear()  # the first step waited for the loader to start
        self._recent.append((float(record["seconds"]), int(record["tokens"])))
        self.step, self.steps = int(record["step"]), int(record["steps"])
        if "skipped" in record:
            why, documents = record["skipped"], some(record["documents"])
            self.note(f"step {self.step} is skipped: {why} (documents {documents})")
            return
        loss = float(record["loss"])
        self.loss = loss if self.loss is None else self.loss + SMOOTH * (loss - self.loss)

    def tick(self) -> None:
        """Call it a few times a second: plain output says that it is still alive."""
        now = time.monotonic()
        if self.live or now - self._printed < PLAIN_SECONDS:
            return
        self._printed = now
        if self.training:
            self.note(f"step {self.step}/{self.steps}  {self._facts()}")
        else:
            self.note(f"{self.phase} … {now - self._phase_began:.0f} s")

    @property
    def training(self) -> bool:
        """Whether steps are being made."""
        return self.phase == "training" and bool(self._recent)

    def _facts(self) -> str:
        seconds = max(1e-9, sum(taken for taken, _ in self._recent))
        rate = sum(tokens for _, tokens in self._recent) / seconds
        left = (self.steps - self.step) * seconds / len(self._recent)
        loss = "-" if self.loss is None else f"{self.loss:.3f}"
        return f"loss {loss}  {rate:,.0f} tokens/s  {self.activity or f'{duration(left)} left'}"

    def _picture(self) -> Table | Text:
        if self.training and self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self.steps, completed=self.step, facts=self._facts())
            return self._bar.make_tasks_table(self._bar.tasks)
        seconds = time.monotonic() - self._phase_began
        frame = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(seconds * 4) % 10]
        return Text(f"{frame} {self.title}: {self.phase or 'starting'} … {seconds:.0f} s")


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def complain(text: str) -> None:
    """An error for people, on stderr."""
    with contextlib.suppress(OSError):
        print(f"mllm: {text}", file=sys.stderr, flush=True)
