"""The `mllm` command."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mllm import cli

RUNNER = CliRunner()


def command_line(
    *arguments: str, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """The `mllm` command in a process of its own."""
    code = "import sys; sys.argv[0] = 'mllm'; from mllm.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=before,
    )


def test_every_command_explains_itself() -> None:
    below_data = [["data", name] for name in ("shard", "info", "lint", "preview")]
    commands = [["train"], ["plan"], ["chat"], ["models"], ["assemble"], ["data"]]
    for arguments in ([], *commands, *below_data):
        result = RUNNER.invoke(cli.app, [*arguments, "--help"])
        assert result.exit_code == 0, arguments
        assert "Usage" in result.output


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_mistake_is_one_message_without_a_traceback(command: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {}\n")
    done = command_line(command, str(file), "optimizer.warmpu=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("mllm: ")
    assert "did you mean 'warmup'?" in done.stderr
    assert "Traceback" not in done.stderr


def pictures(home: Path) -> Path:
    """Two pictures with captions."""
    source = home / "pictures"
    source.mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (8, 8), "red").save(source / f"{name}.png")
        (source / f"{name}.txt").write_text(f"a {name}\n")
    return source


def test_shards_are_named_after_any_folder(tmp_path: Path) -> None:
    source, out = pictures(tmp_path), tmp_path / "my photos (2)"
    done = command_line("data", "shard", str(source), str(out), "--format", "captions")
    assert done.returncode == 0, done.stderr
    assert (out / "my-photos-2-000000.tar").is_file()


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    source = pictures(tmp_path)
    for out in ("/proc/x", str(blocked / "shards")):
        done = command_line("data", "shard", str(source), out, "--format", "captions")
        assert done.returncode == 2
        assert done.stderr.startswith(f"mllm: {out}: ")
        assert "; " in done.stderr
        assert "Traceback" not in done.stderr


def test_a_full_disk_while_sharding_is_one_message_and_leaves_no_shard(tmp_path: Path) -> None:
    source, out = pictures(tmp_path), tmp_path / "shards"
    done = command_line(
        *("data", "shard", str(source), str(out), "--format", "captions"),
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"mllm: {out}: file too large; ")
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_documents_become_shards(tmp_path: Path) -> None:
    source = pictures(tmp_path)
    Image.new("RGB", (8, 8), "red").save(source / "nameless.png")
    out = tmp_path / "shards"
    result = RUNNER.invoke(
        cli.app, ["data", "shard", str(source), str(out), "--format", "captions"]
    )
    assert result.exit_code == 0, result.output
    assert "2 documents with 2 images in 1 shard " in result.output
    assert "1 refused" in result.output
    assert "nameless" in result.output
    assert [p.name for p in sorted(out.glob("*.tar"))] == ["shards-000000.tar"]


def test_the_format_is_found_and_said(tmp_path: Path) -> None:
    source, out = pictures(tmp_path), tmp_path / "shards"
    result = RUNNER.invoke(cli.app, ["data", "shard", str(source), str(out)])
    assert result.exit_code == 0, result.output
    assert f"{source} is read as captions" in result.output
    assert "2 documents with 2 images" in result.output
    file = tmp_path / "talk.jsonl"
    file.write_text('{"image": "pictures/cat.png", "caption": "a cat"}\n{"image": "no.png"}\n')
    done = command_line("data", "shard", str(file), str(out))
    assert done.returncode == 0, done.stderr
    assert f"{file} is read as columns" in done.stdout
    assert "line 2: no caption" in done.stdout
    for arguments, reason in (
        (["--format", "mmc4"], "it looks like columns"),
        (["--format", "columns", "--images", str(out)], "no usable document"),
    ):
        done = command_line("data", "shard", str(file), str(out), *arguments)
        assert done.returncode == 2
        assert reason in done.stderr
        assert "Traceback" not in done.stderr


def test_images_that_are_not_found_are_answered_with_where_to_look(tmp_path: Path) -> None:
    source = pictures(tmp_path)
    good = '{"image": "pictures/cat.png", "caption": "a cat"}\n'
    lost = '{"image": "cat.png", "caption": "a cat"}\n{"image": "/x/y.png", "caption": "y"}\n'
    bad = '{"image": "pictures/cat.png"}\n'
    file, out = tmp_path / "talk.jsonl", tmp_path / "new" / "shards"
    file.write_text(good + lost + bad)
    result = RUNNER.invoke(cli.app, ["data", "shard", str(file), str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == (
        "2 records named an image or clip that was not found: paths started at their file; "
        "--images FOLDER says where else"
    )
    file.write_text(good + bad)
    result = RUNNER.invoke(cli.app, ["data", "shard", str(file), str(out)])
    assert "--images" not in result.output
    file.write_text(lost)
    for arguments in ([], ["--images", str(out)]):
        result = RUNNER.invoke(
            cli.app, ["data", "shard", str(file), str(tmp_path / "o" / "p"), *arguments]
        )
        assert isinstance(result.exception, ValueError)
        last = str(result.exception).splitlines()[-1]
        assert last.startswith("2 records named an image or clip that was not found")
        assert "--images FOLDER" in last
        assert (f"started in {out}" in last) == bool(arguments)
        assert not (tmp_path / "o").exists()
    found = ["data", "shard", str(file), str(tmp_path / "o"), "--images", str(source)]
    assert RUNNER.invoke(cli.app, found).exit_code == 0


def test_a_folder_that_was_there_stays_where_nothing_is_usable(tmp_path: Path) -> None:
    file, out = tmp_path / "talk.jsonl", tmp_path / "shards"
    file.write_text('{"image": "no.png", "caption": "a cat"}\n')
    out.mkdir()
    result = RUNNER.invoke(cli.app, ["data", "shard", str(file), str(out / "a" / "b")])
    assert "no usable document" in str(result.exception)
    assert list(out.iterdir()) == []


def test_a_folder_of_images_must_be_there(tmp_path: Path) -> None:
    source, none = pictures(tmp_path), str(tmp_path / "none")
    out = tmp_path / "shards"
    result = RUNNER.invoke(cli.app, ["data", "shard", str(source), str(out), "--images", none])
    assert isinstance(result.exception, ValueError)
    assert f"--images {none}: there is no such folder" in str(result.exception)
    assert not out.exists()


@pytest.mark.parametrize("more", [[], ["--format", "llava"]])
@pytest.mark.parametrize("kind", ["http", "https", "s3", "hf"])
def test_a_source_that_is_a_url_is_refused_with_what_to_do(
    tmp_path: Path, kind: str, more: list[str]
) -> None:
    url, out = f"{kind}://example.org/talks.jsonl", tmp_path / "shards"
    result = RUNNER.invoke(cli.app, ["data", "shard", url, str(out), *more])
    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith(f"{url}: shards are made of files of this machine")
    assert "download" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_url_of_a_file_is_its_path(tmp_path: Path) -> None:
    source = pictures(tmp_path).rename(tmp_path / "my pictures")
    url, out = f"file://{str(source).replace(' ', '%20')}", tmp_path / "shards"
    result = RUNNER.invoke(cli.app, ["data", "shard", url, str(out)])
    assert result.exit_code == 0, result.output
    assert "2 documents with 2 images" in result.output


def test_shards_cannot_be_written_over_http(tmp_path: Path) -> None:
    source, out = pictures(tmp_path), "https://example.org/shards"
    result = RUNNER.invoke(cli.app, ["data", "shard", str(source), out])
    assert isinstance(result.exception, ValueError)
    assert "nothing can be written over http" in str(result.exception)
    assert "allow" not in str(result.exception)


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    result = RUNNER.invoke(
        cli.app, ["data", "shard", str(tmp_path), str(tmp_path), "--format", "caption"]
    )
    assert isinstance(result.exception, ValueError)
    assert "did you mean 'captions'?" in str(result.exception)
