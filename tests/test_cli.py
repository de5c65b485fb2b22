"""The `mllm` command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mllm import cli

RUNNER = CliRunner()


def test_every_command_explains_itself() -> None:
    for arguments in ([], ["train"], ["plan"], ["chat"], ["data"], ["data", "shard"]):
        result = RUNNER.invoke(cli.app, [*arguments, "--help"])
        assert result.exit_code == 0, arguments
        assert "Usage" in result.output


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_mistake_is_one_message_without_a_traceback(command: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {}\n")
    code = "import sys; sys.argv[0] = 'mllm'; from mllm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(file), "optimizer.warmpu=1"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("mllm: ")
    assert "did you mean 'warmup'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_documents_become_shards(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (8, 8), "red").save(source / f"{name}.png")
        (source / f"{name}.txt").write_text(f"a {name}\n")
    Image.new("RGB", (8, 8), "red").save(source / "nameless.png")
    out = tmp_path / "shards"
    result = RUNNER.invoke(
        cli.app, ["data", "shard", str(source), str(out), "--format", "captions"]
    )
    assert result.exit_code == 0, result.output
    assert "2 documents with 2 images in 1 shards" in result.output
    assert "1 refused" in result.output
    assert "nameless" in result.output
    assert [p.name for p in sorted(out.glob("*.tar"))] == ["shards-000000.tar"]


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    result = RUNNER.invoke(
        cli.app, ["data", "shard", str(tmp_path), str(tmp_path), "--format", "caption"]
    )
    assert isinstance(result.exception, ValueError)
    assert "did you mean 'captions'?" in str(result.exception)
