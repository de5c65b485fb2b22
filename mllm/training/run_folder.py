"""A stage's folder: where everything is, who may write to it, and whether it is whole.

recipe.yaml        what ran, completed and with overrides
run.json           plan hash, recipe identity, versions, seed, parent
metrics.jsonl      one line per step
ledger.jsonl       every document that was split or refused, with the reason
refused.jsonl      documents that failed when they were decoded, with their step
windows.jsonl      fingerprints of the data, of a corpus that is planned in several windows
train.log          what the workers printed
state/             checkpoints, see checkpoint.py
config.json …      the loadable model, written when the stage ends
lora/              the language model's adapters alone, when there are any
lora_<key>/        those of other modules
FINISHED           written last
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_packing.files import sync_folder
from mllm.recipe import Recipe, RecipeError, load

ASSEMBLED = "assembled.json"
"""What `mllm assemble` writes beside a model: its parts and the identity of its weights."""
FULL_DISK = (28, 122, 27)  # ENOSPC, EDQUOT, EFBIG


class NoSpace(OSError):
    """Writing failed because the disk, the quota or a file size limit is full."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Names inside one stage's folder."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON line per step."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """One JSON line per document that was split or refused."""
        return self.path / "ledger.jsonl"

    @property
    def refused(self) -> Path:
        """One JSON line per document that failed when it was decoded, with its step."""
        return self.path / "refused.jsonl"

    @property
    def windows(self) -> Path:
        """One JSON line per window of the data that was opened."""
        return self.path / "windows.jsonl"

    @property
    def log(self) -> Path:
        """What DeepSpeed and the workers printed."""
        return self.path / "train.log"

    @property
    def run(self) -> Path:
        """What decides the result."""
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        """The recipe that ran."""
        return self.path / "recipe.yaml"

    @property
    def state(self) -> Path:
        """Checkpoints."""
        return self.path / "state"

    @property
    def marker(self) -> Path:
        """Exists when the stage is finished and everything in the folder is whole."""
        return self.path / "FINISHED"

    def assembled(self) -> dict[str, Any] | None:
        """What `mllm assemble` says of the model it saved here, None when it saved none."""
        return _read_json(self.path / ASSEMBLED)

    def finished(self) -> dict[str, Any] | None:
        """What the marker says, None while the stage is not finished."""
        return _read_json(self.marker)

    def begun(self) -> dict[str, Any] | None:
        """What run.json says, None when nothing has run here."""
        return _read_json(self.run)

    def check_same(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with a run that another recipe began.

        Raises:
            ValueError: naming what changed and what to do; or the path is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run.output: {self.path} is a file; give the name of a folder")
        begun = self.begun()
        if begun is None:
            return
        changes = differences(self._since(begun.get("identity", {})), identity)
        if changes:
            state = "finished" if self.finished() is not None else "begun"
            raise ValueError(
                f"{self.path}: this stage was {state} with another recipe:\n"
                + "\n".join(f"  {line}" for line in changes)
                + f"\nTo train with the new one, give another run.output or delete {self.path}."
            )

    def _since(self, identity: dict[str, Any]) -> dict[str, Any]:
        """An identity with the defaults of keys that recipes did not have when it was written."""
        try:
            known = load(self.recipe).identity()
        except RecipeError:
            return identity
        return known | identity

    def begin(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        """Write recipe.yaml and run.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        for how in values["train"].values():
            how.pop("frozen", None)
        values["train"] = {key: how or "frozen" for key, how in values["train"].items()}
        write_atomically(self.recipe, yaml.safe_dump(values, sort_keys=False))
        write_atomically(self.run, json.dumps(facts, indent=2) + "\n")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per key that differs between two identities."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "not given"), new.get(key, "not given")
        if before != after:
            lines.append(f"{key}: was {before}, is now {after}")
    return lines


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either whole or not there: temporary name, fsync, rename.

    Raises:
        NoSpace: when the disk is full; the file keeps its old content.
    """
    data = content.encode() if isinstance(content, str) else content
    with full_disk_is_clear(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def settle(folder: Path) -> None:
    """Make the files of a folder readable for all, and wait until they are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def full_disk_is_clear(path: Path) -> Iterator[None]:
    """Turn the many ways in which 'no space left' is reported into one clear error."""
    try:
        yield
    except NoSpace:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        told = any(f"os error {n}" in str(error) for n in FULL_DISK)
        if number not in FULL_DISK and not told:
            raise
        raise NoSpace(
            f"no space left for {path} ({_free(path)}). What was saved before is untouched: make "
            "room and run the same command again."
        ) from error


def _free(path: Path) -> str:
    """How much room there is at a path that may not exist."""
    for place in (path, *path.parents):
        if place.exists():
            return f"{shutil.disk_usage(place).free / 2**20:,.0f} MiB are free there"
    return "its disk is gone"


class Lock:
    """An exclusive lock that the system drops when its holder dies, however it dies.

    Args:
        path: the lock's file; it is made and never removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Take the lock. False when another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._handle = handle
        return True

    def holder(self) -> str:
        """The process id of who took it last, for messages."""
        with contextlib.suppress(OSError):
            return self.path.read_text().strip() or "?"
        return "?"

    def release(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line; a full disk is an error with a clear message."""
    with full_disk_is_clear(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a file; a torn last line is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again."""
    if path.exists():
        kept = [r for r in read_lines(path) if int(r.get("step", 0)) <= step]
        write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to start over") from None
    assert isinstance(content, dict)
    return content
