"""What `mllm checkpoints` shows. Nothing here imports torch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mllm.training.checkpoint_index import INDEX, State, damage, homes, read_state
from mllm.training.progress import duration
from mllm.training.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint.

    Attributes:
        home: its folder.
        state: what its index says, None when that cannot be read.
        saved: when it was taken, in seconds since 1970; 0 when nobody knows.
        damage: what is wrong with it, None when it is whole.
    """

    home: Path
    state: State | None
    saved: float
    damage: str | None

    @property
    def bytes(self) -> int:
        """Size of its files as they are now."""
        return sum(path.stat().st_size for path in self.home.iterdir() if path.is_file())

    def to_json(self) -> dict[str, Any]:
        """For scripts: everything that the table shows, and the path."""
        state = self.state
        return {
            "path": str(self.home),
            "step": state.step if state else None,
            "tokens": state.tokens if state else None,
            "loss": state.loss if state else None,
            "skipped": state.skipped if state else None,
            "bytes": self.bytes,
            "saved": self.saved or None,
            "whole": self.damage is None,
            "damage": self.damage,
        }


def listing(folder: Path) -> list[Entry]:
    """Read and verify every checkpoint of a stage, or of the stages in a folder, the oldest first.

    Raises:
        ValueError: there is no such folder, or no stage in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    stages = [path for path in candidates if RunFolder(path).state.is_dir()]
    if not stages:
        raise ValueError(
            f"{folder}: there is no stage here; give the folder that a stage writes to (run.output)"
        )
    return [entry(home) for stage in stages for home in homes(RunFolder(stage).state)]


def entry(home: Path) -> Entry:
    """Read and verify one checkpoint."""
    try:
        state = read_state(home)
        saved = state.saved or (home / INDEX).stat().st_mtime
    except (OSError, ValueError, TypeError):
        return Entry(home, None, 0.0, damage(home))
    return Entry(home, state, saved, damage(home))


def table(entries: list[Entry]) -> Table | str:
    """A line for each, under the name of its stage."""
    if not entries:
        return "no checkpoint yet"
    shown = Table("stage", "step", "tokens", "loss", "size", "age", "", box=None, pad_edge=False)
    for column in shown.columns[1:6]:
        column.justify = "right"
    for one in entries:
        state = one.state
        shown.add_row(
            one.home.parent.parent.name,
            f"{state.step:,}" if state else one.home.name,
            f"{state.tokens:,}" if state else "-",
            f"{state.loss:.4f}" if state and state.loss is not None else "-",
            f"{one.bytes / 2**20:,.1f} MiB",
            duration(time.time() - one.saved) if one.saved else "-",
            "whole" if one.damage is None else f"damaged: {one.damage}",
        )
    return shown
