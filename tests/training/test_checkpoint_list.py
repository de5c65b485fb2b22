"""`mllm checkpoints`: what is there, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mllm.cli import app
from mllm.training.checkpoint_index import State
from mllm.training.checkpoint_list import listing, table

FILES = ("00-0000.safetensors", "01-0000.safetensors")


def write(stage: Path, step: int, loss: float | None = 2.5) -> Path:
    """A checkpoint as its index describes one; what its tensors are does not matter here."""
    home = stage / "state" / f"step-{step:08d}"
    home.mkdir(parents=True)
    files = {}
    for name in FILES:
        data = f"{step} {name} ".encode() * 1000
        (home / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files[name] = {"bytes": len(data), "sha256": digest, "parameters": []}
    numbers = {"step": step, "tokens": 1000 * step, "loss": loss, "saved": time.time() - 90}
    state = State(cursor={}, plan="", frozen="", seed=0, seconds=1.0, files=files, **numbers)  # type: ignore[arg-type]
    (home / "index.json").write_text(json.dumps(asdict(state)))
    return home


def shown(folder: Path) -> str:
    console = Console(record=True, width=160, force_terminal=False)
    console.print(table(listing(folder)))
    return console.export_text()


def test_checkpoints_are_listed_and_verified(tmp_path: Path) -> None:
    write(tmp_path / "1_align", 100)
    bad = write(tmp_path / "1_align", 200, loss=None)
    (tmp_path / "1_align" / "state" / ".writing-step-00000300").mkdir()
    text = shown(tmp_path / "1_align")
    assert "damaged" not in text
    assert [line.split()[:4] for line in text.splitlines()[1:]] == [
        ["1_align", "100", "100,000", "2.5000"],
        ["1_align", "200", "200,000", "-"],
    ]
    assert "1 min 30 s" in text
    assert "whole" in text

    data = bytearray((bad / FILES[1]).read_bytes())
    data[-1] ^= 1
    (bad / FILES[1]).write_bytes(data)
    found = listing(tmp_path / "1_align")
    assert [entry.damage is None for entry in found] == [True, False]
    text = shown(tmp_path / "1_align")
    assert f"damaged: {FILES[1]} does not have the checksum it was written with" in text


def test_a_folder_of_stages_is_listed_whole(tmp_path: Path) -> None:
    write(tmp_path / "2_tune", 7)
    write(tmp_path / "1_align", 9)
    (tmp_path / "notes").mkdir()
    assert [entry.home.parent.parent.name for entry in listing(tmp_path)] == ["1_align", "2_tune"]
    (tmp_path / "3_more" / "state").mkdir(parents=True)
    assert listing(tmp_path / "3_more") == []
    assert "no checkpoint yet" in shown(tmp_path / "3_more")


def test_the_command_says_by_its_status_whether_all_are_whole(tmp_path: Path) -> None:
    home = write(tmp_path, 5)
    good = CliRunner().invoke(app, ["checkpoints", str(tmp_path), "--json"])
    assert good.exit_code == 0
    (entry,) = json.loads(good.output)
    assert (entry["step"], entry["tokens"], entry["loss"], entry["whole"]) == (5, 5000, 2.5, True)
    size = sum(path.stat().st_size for path in home.iterdir())
    assert (entry["bytes"], entry["path"]) == (size, str(home))
    (home / "index.json").write_text("{")
    bad = CliRunner().invoke(app, ["checkpoints", str(tmp_path), "--json"])
    assert bad.exit_code == 1
    (entry,) = json.loads(bad.output)
    assert (entry["step"], entry["whole"]) == (None, False)
    assert entry["damage"].startswith("index.json:")
    assert CliRunner().invoke(app, ["checkpoints", str(tmp_path)]).exit_code == 1


def test_a_folder_that_is_no_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        listing(tmp_path / "gone")
    with pytest.raises(ValueError, match="no stage here; give the folder"):
        listing(tmp_path)
