"""A few members of a large Debian package, without fetching all of it.

apt-get is started, its file is read while it grows, and apt-get is stopped as soon as the members
named in excerpt.json have gone by. They are kept as a small plain tar that is read like the
package. Each member's sha256 is pinned.

    python -m scripts.quickstart.excerpt        choose and pin anew, from the whole packages
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from scripts.quickstart.archive import members
from scripts.quickstart.console import Advance, bar, warn
from scripts.quickstart.downloads import Fetched, ended, finished, sha256, write_note
from scripts.quickstart.sources import Source

__all__ = ["PINS_FILE", "fetch_members", "read_pins"]

PINS_FILE = Path(__file__).with_name("excerpt.json")
INSIDE = "!/"
"""Between the path of a zip in the package and the path of a member in that zip."""

_POLL_SECONDS = 0.05

Pins = dict[str, str]


def read_pins(source: Source) -> Pins:
    """The sha256 of each wanted member, by path; `a.zip!/b` is b inside the zip a."""
    pins: dict[str, Pins] = json.loads(PINS_FILE.read_text(encoding="utf-8"))
    return pins[source.name]


def fetch_members(source: Source, folder: Path) -> tuple[Path, Fetched]:
    """Return a tar of the pinned members of a package, fetching as little of it as they need.

    Raises:
        ValueError: apt-get failed, or a member of the tested release has another checksum.
    """
    pins = read_pins(source)
    edition = hashlib.sha256(json.dumps(pins).encode()).hexdigest()[:12]
    home = folder / "excerpts" / edition
    home.mkdir(parents=True, exist_ok=True)
    found = finished(source, home)
    if found is not None:
        return found
    with _package(source, folder) as (name, package):
        content = _collect(package, pins)
    version = source.release(name)
    _check(source, content, pins, tested=version == source.version)
    place = home / f"{source.package}_{version}_excerpt.tar"
    temporary = place.with_suffix(".tmp")
    _write_tar(temporary, content)
    os.replace(temporary, place)
    note = Fetched(
        source=source.name,
        file=place.name,
        version=version,
        sha256=sha256(place),
        size=place.stat().st_size,
        tested=source.matches(place.name),
    )
    write_note(place, note)
    return place, note


def _collect(package: Path | BinaryIO, pins: Pins) -> dict[str, bytes]:
    """The wanted members, read until the last one has gone by."""
    outer = {name.split(INSIDE)[0] for name in pins}
    content: dict[str, bytes] = {}
    for path, file in members(package):
        name = str(path)
        if name in outer:
            data = file.read()
            content[name] = _repacked(data, name, pins) if name not in pins else data
            outer.remove(name)
        if not outer:
            break
    return content


def _repacked(data: bytes, name: str, pins: Pins) -> bytes:
    """A zip with the wanted members only, the same bytes whenever it is made."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(output, "w") as new:
        for inner in sorted(p.split(INSIDE)[1] for p in pins if p.startswith(name + INSIDE)):
            if inner in old.namelist():
                new.writestr(zipfile.ZipInfo(inner), old.read(inner))
    return output.getvalue()


def _check(source: Source, content: dict[str, bytes], pins: Pins, tested: bool) -> None:
    digests = {name: digest for name, digest in _digests(content) if name in pins}
    wrong = [name for name in pins if digests.get(name) != pins[name]]
    if not wrong:
        return
    if tested:
        raise ValueError(
            f"{source.package} {source.version}: {wrong[0]} and {len(wrong) - 1} more members are "
            "missing or not as pinned; check what stands between you and the registry"
        )
    warn(f"{source.package} is not the tested release: {len(wrong)} members differ or are missing")


def _digests(content: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for name, data in content.items():
        yield name, hashlib.sha256(data).hexdigest()
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for inner in archive.namelist():
                    digest = hashlib.sha256(archive.read(inner)).hexdigest()
                    yield f"{name}{INSIDE}{inner}", digest


def _write_tar(path: Path, content: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in sorted(content.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@contextmanager
def _package(source: Source, folder: Path) -> Iterator[tuple[str, Path | BinaryIO]]:
    """The package's file name and content: from the cache, or while apt-get fetches it."""
    whole = finished(source, folder)
    if whole is not None:
        yield whole[0].name, whole[0]
        return
    work = folder / "partial" / f"{source.name}-excerpt"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with (work / "apt.log").open("w") as log:
        process = subprocess.Popen(
            ["apt-get", "download", source.package],
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    label = f"Fetching the beginning of {source.package}"
    with bar(label, bytes_shown=True) as advance, ended(process):
        path = _appears(work, process)
        with path.open("rb") as file:
            yield path.name, cast(BinaryIO, _Growing(file, process, advance))
        process.terminate()
    shutil.rmtree(work)


def _appears(work: Path, process: subprocess.Popen[bytes]) -> Path:
    while True:
        running = process.poll() is None
        for path in work.rglob("*.deb"):
            return path
        if not running:
            log = (work / "apt.log").read_text().strip()
            raise ValueError(f"apt-get download failed; is the network up?\n    {log}")
        time.sleep(_POLL_SECONDS)


class _Growing:
    """A file that another process is still writing; a read waits until there is something."""

    def __init__(self, file: BinaryIO, process: subprocess.Popen[bytes], advance: Advance) -> None:
        self._file, self._process, self._advance = file, process, advance

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end of the finished file."""
        parts: list[bytes] = []
        while size > 0:
            running = self._process.poll() is None
            data = self._file.read(size)
            parts.append(data)
            size -= len(data)
            if not data and not running:
                break
            if not data:
                time.sleep(_POLL_SECONDS)
        self._advance(self._file.tell(), 0)
        return b"".join(parts)


def main() -> int:
    """Choose the members of every excerpt and pin them."""
    from scripts.quickstart.excerpt_choice import choose

    PINS_FILE.write_text(json.dumps(choose(), indent=0, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
