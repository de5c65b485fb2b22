"""Progress on the terminal: a bar where there is one, plain lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

__all__ = ["Advance", "bar", "console", "say", "warn"]

Advance = Callable[[int, int], None]
"""Called with (done, total); total 0 means that nobody knows how much there is."""

console = Console(highlight=False, soft_wrap=True)
_QUIET_SECONDS = 2.0


def say(text: str) -> None:
    """Print a line above the bars."""
    console.print(text, markup=False)


def warn(text: str) -> None:
    """Print a line that should be noticed."""
    console.print(f"warning: {text}", style="yellow", markup=False)


@contextmanager
def bar(label: str, bytes_shown: bool = False) -> Iterator[Advance]:
    """Show a bar while the block runs; the block calls what it is given with (done, total).

    Without a terminal a line is printed at the start, and one when it took over two seconds.
    """
    started = time.monotonic()
    if not console.is_terminal:
        say(f"{label} …")
        yield lambda done, total: None
        seconds = time.monotonic() - started
        if seconds > _QUIET_SECONDS:
            say(f"{label}: {seconds:.0f} s")
        return
    counts: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()] if bytes_shown else [MofNCompleteColumn()]
    )
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), *counts]
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)
