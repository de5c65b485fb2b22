"""Finished downloads: a file and a note of its version and hash; without the note it is none."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scripts.quickstart.console import warn
from scripts.quickstart.sources import Source

__all__ = ["Fetched", "apt_size", "checked", "ended", "finished", "sha256", "write_note"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A finished download: its file, version and hash, and whether it is the tested release."""

    source: str
    file: str
    version: str
    sha256: str
    size: int
    tested: bool


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished(source: Source, folder: Path) -> tuple[Path, Fetched] | None:
    """A whole download of the source in the cache, the tested release before any other."""
    candidates = sorted(_notes(source, folder), key=lambda pair: not pair[1].tested)
    for path, note in candidates:
        if path.is_file() and path.stat().st_size == note.size and sha256(path) == note.sha256:
            if not note.tested:
                _warn_untested(source, note)
            return path, note
        warn(f"{path.name} in the cache is damaged; fetching it again")
        path.unlink(missing_ok=True)
        _note_path(path).unlink(missing_ok=True)
    return None


def _notes(source: Source, folder: Path) -> Iterator[tuple[Path, Fetched]]:
    for note in folder.glob("*.json"):
        try:
            content = Fetched(**json.loads(note.read_text()))
        except (ValueError, TypeError):
            continue  # not ours, or torn: the file beside it counts as never fetched
        if content.source == source.name:
            content = replace(content, tested=source.matches(content.file))
            yield folder / content.file, content


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def write_note(path: Path, note: Fetched) -> None:
    """Write the note that makes the file a finished download."""
    temporary = _note_path(path).with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(note), indent=2))
    os.replace(temporary, _note_path(path))


def checked(source: Source, path: Path) -> Fetched:
    """The note of a file that arrived.

    Raises:
        ValueError: it claims to be the tested release and is not.
    """
    digest, tested = sha256(path), source.matches(path.name)
    if tested and digest != source.sha256:
        size = path.stat().st_size
        path.unlink()
        raise ValueError(
            f"{path.name} arrived with sha256 {digest} ({size:,} bytes) instead of "
            f"{source.sha256} ({source.size:,} bytes). It was thrown away; run the same command "
            "again, and if that does not help, check what stands between you and the registry."
        )
    note = Fetched(
        source=source.name,
        file=path.name,
        version=source.release(path.name),
        sha256=digest,
        size=path.stat().st_size,
        tested=tested,
    )
    if not tested:
        _warn_untested(source, note)
    return note


def _warn_untested(source: Source, note: Fetched) -> None:
    warn(
        f"{source.package} {note.version} is not the tested release {source.version}; "
        f"going on with it (sha256 {note.sha256[:16]}… is in the manifest)"
    )


def apt_size(source: Source) -> int:
    """The bytes of the package that apt-get would fetch; 0 if it does not say."""
    answer = subprocess.run(
        ["apt-get", "download", "--print-uris", source.package], capture_output=True, text=True
    )
    fields = answer.stdout.split()
    return int(fields[2]) if len(fields) >= 3 and fields[2].isdigit() else 0


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Leave no client behind, whatever ends the block."""
    try:
        yield
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
