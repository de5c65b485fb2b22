"""What a checkpoint says of itself, and whether it is whole. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
INDEX = "index.json"
DRAFT = ".writing-"
"""Begins the name of a checkpoint that is being written, and of one that never was finished."""


@dataclass(slots=True)
class State:
    """What a checkpoint says about the run, beside the tensors.

    Attributes:
        step: steps done.
        cursor: where the data plan goes on.
        plan: hash of the data plan.
        frozen: hash of everything that does not train.
        seed: the recipe's.
        seconds: training time so far.
        tokens: useful tokens so far.
        skipped: steps that changed nothing, since their loss or gradient was not finite.
        in_a_row: how many of these were the last ones.
        loss: of the last step that had a finite one.
        saved: when it was taken, in seconds since 1970.
        groups: parameter → name of its group.
        files: file name → {"bytes": size, "sha256": hex, "parameters": names}.
    """

    step: int
    cursor: dict[str, int | str]
    plan: str
    frozen: str
    seed: int
    seconds: float
    tokens: int
    skipped: int = 0
    in_a_row: int = 0
    loss: float | None = None
    saved: float = 0.0
    groups: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Size of its tensors on disk."""
        return sum(int(facts["bytes"]) for facts in self.files.values())


def homes(folder: Path) -> list[Path]:
    """The checkpoints in a run's `state/`, whole or not, the oldest first."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and one warning for each newer one that is not."""
    warnings: list[str] = []
    for home in reversed(homes(folder)):
        problem = damage(home)
        if problem is None:
            return home, warnings
        warnings.append(f"{home} is damaged ({problem}) and is not used")
    return None, warnings


def damage(home: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is: sizes, and the hash of every file."""
    try:
        state = read_state(home)
    except (OSError, ValueError, TypeError) as error:
        return f"{INDEX}: {error}"
    return next(_wrong_files(home, state), None)


def _wrong_files(home: Path, state: State) -> Iterator[str]:
    for name, facts in state.files.items():
        path = home / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != facts["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
        else:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    yield f"{name} does not have the checksum it was written with"


def read_state(home: Path) -> State:
    """What index.json says. Raises ValueError for another format."""
    values = json.loads((home / INDEX).read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')}, this program reads {FORMAT}")
    return State(**values)
