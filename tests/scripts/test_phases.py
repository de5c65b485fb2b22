"""Phases: whole or absent, skipped when done, redone when changed, one run at a time."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.quickstart import captions, shapes
from scripts.quickstart.console import Advance
from scripts.quickstart.phases import Workspace, fingerprint, locked


def building(content: str) -> Any:
    def build(folder: Path, advance: Advance) -> dict[str, Any]:
        (folder / "file").write_text(content)
        return {"files": 1}

    return build


def failing(folder: Path, advance: Advance) -> dict[str, Any]:
    (folder / "half").write_text("half")
    raise KeyboardInterrupt


def test_an_interrupted_phase_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    with pytest.raises(KeyboardInterrupt), space.lock():
        space.phase("raw/x", "x", "1", failing)
    assert not (tmp_path / "raw").exists()
    with space.lock():
        space.phase("raw/x", "x", "1", building("whole"))
    assert [p.name for p in sorted((tmp_path / "raw" / "x").iterdir())] == [".done.json", "file"]


def test_an_interrupted_redoing_keeps_what_was_there(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    space.phase("x", "x", "1", building("old"))
    with pytest.raises(KeyboardInterrupt):
        space.phase("x", "x", "2", failing)
    assert (tmp_path / "x" / "file").read_text() == "old"
    assert space.done("x", "2") is None


def test_done_is_skipped_and_changed_is_redone(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    first = space.phase("x", "x", "1", building("first"))
    assert space.phase("x", "x", "1", failing) == first
    space.phase("x", "x", "2", building("second"))
    assert (tmp_path / "x" / "file").read_text() == "second"


def test_a_fingerprint_is_of_parameters_and_of_code() -> None:
    assert fingerprint(shapes, 1.0) == fingerprint(shapes, 1.0)
    assert (
        len({fingerprint(shapes, 1.0), fingerprint(shapes, 0.1), fingerprint(captions, 1.0)}) == 3
    )


def hold(path: Path, seconds: float) -> None:
    with locked(path):
        path.with_name("held").touch()
        time.sleep(seconds)


def test_a_second_run_waits_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "l", 1.5))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.02)
    started = time.monotonic()
    with locked(tmp_path / "l"):
        waited = time.monotonic() - started
    process.join()
    assert waited > 0.5
    assert f"process {process.pid}" in capsys.readouterr().out
