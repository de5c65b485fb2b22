"""`mllm data info`, `lint` and `preview`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from packing_toys import captions, image, png
from typer.testing import CliRunner

from data_packing.document import Document, Image, Text
from data_packing.ledger import Refusal
from data_packing.sharding import write_shards
from mllm import cli
from tests.evaluation.tiny import make_model, save_stage
from tests.test_cli import command_line

RUNNER = CliRunner()


def run(*arguments: object) -> Any:
    return RUNNER.invoke(cli.app, ["data", *map(str, arguments)])


def good(count: int = 2) -> list[Document]:
    return [Document.caption(image(16, 16, n), f"caption {n}", "t", f"k{n}") for n in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources: `clean`, and `odd` with a broken image and a lost character."""
    write_shards(good(), tmp_path, "clean", 1)
    broken = Document((Image(png(16, 16)[:-60], 16, 16), Text("x")), "t", "broken")
    lost = Document((Text("caf\ufffd"),), "t", "lost")
    write_shards([broken, lost], tmp_path, "odd")
    write_shards([lost], tmp_path, "doubtful")
    return tmp_path


def test_info_reads_several_patterns_and_writes_json(folder: Path) -> None:
    result = run("info", folder / "clean-{000000..000001}.tar", folder / "odd*", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["sources"].keys() == {"clean", "odd"}
    assert values["sources"]["clean"]["shards"] == 2
    assert values["all"]["documents"] == 4
    table = run("info", folder)
    assert table.exit_code == 0
    assert "doubtful" in table.stdout
    assert "documents/s" in table.stderr


def test_lint_exits_0_when_clean_1_on_defects(folder: Path) -> None:
    clean = run("lint", folder / "clean*.tar")
    assert (clean.exit_code, "2 shards: clean" in clean.stdout) == (0, True)
    warned = run("lint", folder / "doubtful*.tar")
    assert warned.exit_code == 0
    assert "replacement" in warned.stdout
    assert run("lint", folder / "doubtful*.tar", "--strict").exit_code == 1
    assert run("lint", folder / "clean*.tar", "--strict").exit_code == 0
    assert run("lint", folder / "odd*.tar").exit_code == 1


def test_lint_writes_every_defect_as_a_line(folder: Path) -> None:
    result = run("lint", folder, "--json", "--workers", 1)
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = [(line["level"], line["kind"], line["source"], line["key"]) for line in lines[:-1]]
    assert found == [
        ("warning", "replacement character", "doubtful", "lost"),
        ("error", "undecodable image", "odd", "broken"),
        ("warning", "replacement character", "odd", "lost"),
        ("warning", "duplicate document", "odd", "lost"),
    ]
    assert lines[-1]["level"] == "summary"
    assert (lines[-1]["errors"], lines[-1]["warnings"], lines[-1]["documents"]) == (1, 3, 5)


def test_lint_lists_what_sharding_refused(tmp_path: Path) -> None:
    write_shards([*good(), Refusal("t", "gone", "no caption")], tmp_path, "t")
    table = run("lint", tmp_path)
    assert table.exit_code == 1
    assert "refused when sharded" in table.stdout
    assert "t gone: no caption" in table.stdout
    result = run("lint", tmp_path, "--json")
    assert result.exit_code == 1
    first, last = map(json.loads, result.stdout.splitlines())
    assert (first["kind"], first["key"], first["detail"]) == (
        "refused when sharded",
        "gone",
        "no caption",
    )
    assert last["kinds"] == {"refused when sharded": 1}


def test_lint_with_a_model_keeps_the_libraries_quiet(tmp_path: Path) -> None:
    model, processor = make_model(tmp_path / "parts")
    stage = save_stage(tmp_path / "1", model, processor, tmp_path / "parts" / "llama")
    settings = stage / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 4}))
    write_shards(good(), tmp_path / "shards", "t", 1)
    arguments = ["data", "lint", str(tmp_path / "shards"), "--model", str(stage)]
    done = command_line(*arguments, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "2 shards: clean" in done.stdout
    assert re.fullmatch(r"2 documents in .* documents/s\n", done.stderr)


def test_wrong_use_is_an_error_for_people(folder: Path, tmp_path: Path) -> None:
    wrong: list[tuple[list[object], str]] = [
        (["lint", folder / "none-*.tar"], "no shard matches"),
        (["lint", folder, "--tokens", 64], "--tokens needs --model"),
        (["info", folder / "none.tar"], "no shard matches"),
        (["info", folder.parent], f"in folders of it: give '{folder.parent}/*/*.tar'"),
        (["info", folder, "--model", folder], "no config.json"),
        (["preview", folder], "folder of stages"),
        (["preview", tmp_path / "r.yaml"], "no such recipe"),
    ]
    for arguments, message in wrong:
        result = run(*arguments)
        assert isinstance(result.exception, ValueError), arguments  # main() turns it into status 2
        assert message in str(result.exception)
    assert run("lint").exit_code == 2


def test_info_refuses_a_shard_that_is_cut(folder: Path) -> None:
    path = folder / "clean-000000.tar"
    path.write_bytes(path.read_bytes()[:-2000])
    result = run("info", folder)
    assert isinstance(result.exception, ValueError)
    assert "truncated" in str(result.exception)


def test_many_documents_go_through_processes(tmp_path: Path) -> None:
    write_shards(captions(300), tmp_path, "many")
    one, two = (run("info", tmp_path, "--json", "--workers", n).stdout for n in (1, 2))
    assert json.loads(one) == json.loads(two)
