"""`mllm assemble`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from mllm import cli
from mllm.inference.generate import Generator
from mllm.models.assemble import assemble as build
from mllm.recipe import load, load_parts
from mllm.training import assembly
from mllm.training.export import weights_id
from mllm.training.sources import parent_id
from tests.training import tiny

RUNNER = CliRunner()


def section(home: Path, **changes: Any) -> dict[str, Any]:
    """A `model:` section."""
    return {**tiny.recipe(home, home)["model"], **changes}


def write(folder: Path, **values: Any) -> Path:
    """A recipe that says no more than this."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parts.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def said(file: Path, output: Path | None, dtype: str = "auto", *overrides: str) -> str:
    """What the command prints."""
    console = Console(record=True, width=80, force_terminal=False)
    assembly.assemble(load_parts(file, overrides), output, dtype, console)
    return console.export_text()


def test_a_folder_that_everything_loads(home: Path, tmp_path: Path) -> None:
    file = write(tmp_path, model=section(home))
    output = tmp_path / "deep" / "start"
    text = said(file, output)
    model, processor = AutoModelForImageTextToText.from_pretrained(output), AutoProcessor
    found = processor.from_pretrained(output)
    assert f"{sum(p.numel() for p in model.parameters()):,} │ float32" in text
    assert "trainable" not in text
    assert max(map(len, text.split(" MiB in ")[0].splitlines())) <= 80
    again, own = build({"from": output})
    assert own.fingerprint == found.fingerprint
    document = next(tiny.captions(1))
    with torch.no_grad():
        wanted = model(**found.prompt(document)).logits
        assert torch.equal(again(**own.prompt(document)).logits, wanted)
    config = again.generation_config
    assert config is not None
    assert own.image_token_id in (config.suppress_tokens or [])
    assert isinstance("".join(Generator.from_pretrained(output).stream(document, 3)), str)
    assert json.loads((output / "assembled.json").read_text())["model"] == section(home)
    assert not [path for path in output.parent.iterdir() if path != output]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in output.iterdir())


def test_what_learns_is_counted_and_not_saved(home: Path, tmp_path: Path) -> None:
    train = {
        "connector": {"lr": 1e-3},
        "language_model": {"lr": 1e-3, "lora": {"rank": 2}},
    }
    file = write(tmp_path, model=section(home), train=train)
    text = said(file, tmp_path / "start")
    rows = [line.replace("│", " ").split() for line in text.splitlines() if "float32" in line]
    counts = {name: [each.replace(",", "") for each in cells] for name, *cells in rows}
    adapters = 2 * sum(
        2 * a for a in (24 + 24, 24 + 12, 24 + 12, 24 + 24, 24 + 36, 24 + 36, 36 + 24)
    )
    assert counts["encoder"][1:3] == ["0", "0"]
    assert counts["connector"][0] == counts["connector"][1]
    assert counts["language_model"][1:3] == [str(adapters)] * 2
    weights = load_file(tmp_path / "start" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    build({"from": tmp_path / "start"})


@pytest.mark.parametrize("fusion", ["in_sequence", "cross_attention"])
def test_images_and_their_tokens(home: Path, tmp_path: Path, fusion: str) -> None:
    parts = section(home, images={"tiling": "dynamic", "tiles": 6}, fusion={"name": fusion})
    text = said(write(tmp_path, model=parts), None)
    cells = [line.replace("│", " ").split() for line in text.splitlines() if " × " in line]
    _, processor = build(parts)
    for (width, height), row in zip(assembly.EXAMPLES, cells, strict=True):
        tokens, patches = processor.image_cost(height, width)
        views = processor.image_bytes(height, width) // (3 * tiny.SIDE**2)
        assert tokens == (4 * views if fusion == "in_sequence" else 1)
        counts = (tokens, 4 * views, views, patches)
        assert row == [str(width), "×", str(height), *map(str, counts)]
    assert len({row[-2] for row in cells}) > 1


def test_a_dry_run_reads_no_weights(home: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for name in ("llm", "clip"):
        shutil.copytree(home / name, parts / name)
    train = {"language_model": {"lr": 1e-3, "lora": {"rank": 2}}}
    values = section(parts, connector={"name": "average_pool", "visual_tokens": 4})
    file = write(tmp_path, model=values, train=train)
    wanted = said(file, tmp_path / "start").splitlines()
    for weights in parts.rglob("*.safetensors"):
        weights.unlink()
    found = said(file, None).splitlines()
    assert found[:-1] == wanted[:-2]
    assert len(found) > 15
    assert found[-1] == "Nothing was saved: no weights were read."
    for weights in (tmp_path / "start").glob("*.safetensors"):
        weights.unlink()
    again = write(tmp_path / "again", model={"from": str(tmp_path / "start")}, train=train)
    assert said(again, None).splitlines() == found


def test_precision_is_the_language_models_unless_given(home: Path, tmp_path: Path) -> None:
    file = write(tmp_path, model=section(home))
    assert "float32" in said(file, None)
    for dtype, word in (("bf16", "bfloat16"), ("fp16", "float16")):
        text = said(file, tmp_path / dtype, dtype)
        assert text.count(word) == 4
        weights = load_file(tmp_path / dtype / "model.safetensors")
        assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{word}"}
    model, _ = build({"from": tmp_path / "bf16"}, "auto")
    assert model.dtype == torch.bfloat16
    folder = tmp_path / "llm"
    shutil.copytree(home / "llm", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    file = write(tmp_path, model=section(home, language_model={"path": str(folder)}))
    assert said(file, None).count("bfloat16") == 4


def test_a_folder_with_something_else_is_left_alone(home: Path, tmp_path: Path) -> None:
    file, output = write(tmp_path, model=section(home)), tmp_path / "start"
    output.mkdir()
    said(file, output)  # an empty folder will do
    first = (output / "assembled.json").stat().st_ino
    said(file, output)  # and so will one that it made
    assert (output / "assembled.json").stat().st_ino != first
    (output / "run.json").write_text("{}")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for place in (output, other, home / "llm"):
        before = sorted(place.iterdir())
        with pytest.raises(ValueError, match=r"holds something else \(.*\); give another folder"):
            said(file, place)
        assert sorted(place.iterdir()) == before
    with pytest.raises(ValueError, match="is a file; give the name of a folder"):
        said(file, file)


def test_a_mistake_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    train = {"language_model.nrom": {"lr": 1e-3}}
    file, output = write(tmp_path, model=section(home), train=train), tmp_path / "out" / "start"
    with pytest.raises(ValueError, match=r"train\.language_model\.nrom: the model has no such"):
        said(file, output)
    assert list(output.parent.iterdir()) == []


def test_a_tokenizer_without_a_chat_template_is_said_aloud(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(home / "llm", folder)
    (folder / "chat_template.jinja").unlink()
    file = write(tmp_path, model=section(home, language_model={"path": str(folder)}))
    text = " ".join(said(file, tmp_path / "start").split())
    assert assembly.NO_TEMPLATE in text
    assert "no chat template" not in said(write(tmp_path, model=section(home)), None)
    _, processor = build({"from": tmp_path / "start"})
    processor.encode(next(tiny.captions(1)))  # raw documents work, as is said
    arguments = ["chat", str(tmp_path / "start"), "--question", "What is this?"]
    refused = RUNNER.invoke(cli.app, arguments).exception
    assert "has no chat template" in str(refused)


def test_ridge_is_said_to_need_data(home: Path, tmp_path: Path) -> None:
    file = write(tmp_path, model=section(home, connector={"name": "mlp", "init": "ridge"}))
    assert assembly.RIDGE in " ".join(said(file, None).split())


def test_a_whole_recipe_and_its_default_place(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = tiny.recipe(home, tmp_path / "run")
    tiny.write_recipe(tmp_path / "mine" / "1_align.yaml", values)
    result = RUNNER.invoke(cli.app, ["assemble", "mine/1_align.yaml", "model.connector.hidden=7"])
    assert result.exit_code == 0, result.output
    saved = tmp_path / "outputs" / "mine" / "1_align-assembled"
    assert json.loads((saved / "config.json").read_text())["connector"]["hidden"] == 7
    assert "model: {from: outputs/mine/1_align-assembled}" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bf61"], "--dtype bf61 is not known; did you mean 'bf16'?"),
        (["model.encoder.nme=x"], "unknown option 'nme' of the encoder clip"),
        (["modle.encoder.name=x"], "unknown key 'modle'; did you mean 'model'?"),
        (["train.connector={}"], "train.connector has no learning rate"),
        (["model.encoder.path=./no"], "model.encoder.path: there is no folder ./no"),
        (["model.connector={name: q_former, path: ./no}"], "model.connector.path: there is no"),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(
    home: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    file = write(tmp_path, model=section(home))
    refused = RUNNER.invoke(cli.app, ["assemble", str(file), *arguments, "--dry-run"]).exception
    assert message in str(refused)
    refused = RUNNER.invoke(cli.app, ["assemble", str(tmp_path)]).exception
    assert "is a folder of stages" in str(refused)


def test_a_run_knows_which_assembled_model_it_began_from(home: Path, tmp_path: Path) -> None:
    ids = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        output = tmp_path / str(seed)
        said(write(tmp_path, model=section(home)), output)
        values = {**tiny.recipe(home, tmp_path / "run"), "model": {"from": str(output)}}
        ids.append(parent_id(load(tiny.write_recipe(tmp_path / "stage.yaml", values))))
        assert ids[-1] == weights_id(output)
    assert ids[0] != ids[1]
