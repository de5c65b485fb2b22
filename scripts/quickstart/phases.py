"""Folders that are whole or absent: build aside, rename, skip what is done, one at a time."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts.quickstart.console import Advance, bar, say

__all__ = ["DONE", "Workspace", "fingerprint", "locked"]

DONE = ".done.json"
"""The file in a finished folder that says from what it was made."""


def fingerprint(*parts: object) -> str:
    """A hash of parameters and of the source text of modules: another code, another hash."""
    digest = hashlib.sha256()
    for part in parts:
        text = inspect.getsource(part) if isinstance(part, ModuleType) else repr(part)
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; a second run waits and says for whom. Freed by the system on any end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            say(f"Waiting for another run (process {owner}) that uses {path.parent} …")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


class Workspace:
    """A data folder whose sub-folders are made by phases.

    Args:
        root: the data folder; made if it is missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time; what an interrupted run left half built is removed."""
        with locked(self.root / ".lock"):
            shutil.rmtree(self._aside, ignore_errors=True)
            try:
                yield
            finally:
                shutil.rmtree(self._aside, ignore_errors=True)

    def done(self, folder: str, mark: str) -> dict[str, Any] | None:
        """What the phase noted when it finished with this fingerprint, or None."""
        try:
            note: dict[str, Any] = json.loads((self.root / folder / DONE).read_text())
        except (OSError, ValueError):
            return None
        return note if note.get("fingerprint") == mark else None

    def phase(
        self,
        folder: str,
        label: str,
        mark: str,
        build: Callable[[Path, Advance], dict[str, Any]],
    ) -> dict[str, Any]:
        """Make `folder` with `build(empty folder, advance)` unless it is there already.

        The folder appears at once and whole: it is built aside and renamed. `build` returns counts
        to remember.
        """
        note = self.done(folder, mark)
        if note is not None:
            return note
        target, new = self.root / folder, self._aside / folder
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        started = time.monotonic()
        with bar(label) as advance:
            counts = build(new, advance)
        note = {
            "fingerprint": mark,
            "seconds": round(time.monotonic() - started, 1),
            "counts": counts,
        }
        (new / DONE).write_text(json.dumps(note, indent=2))
        self._swap(new, target)
        return note

    def _swap(self, new: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        old = self._aside / "old" / target.name
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            old.parent.mkdir(parents=True, exist_ok=True)
            os.replace(target, old)
        os.replace(new, target)
        shutil.rmtree(old, ignore_errors=True)

    @property
    def _aside(self) -> Path:
        return self.root / ".building"
