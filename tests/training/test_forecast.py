"""`mllm plan`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mllm import cli
from mllm.models.composites import COMPOSITES
from mllm.training.forecast import forecast
from tests.models import composite_folders, llava_folders
from tests.models.llava_folders import save_llava_siglip
from tests.models.qwen_folders import KINDS, save_qwen_vl
from tests.training import tiny

RUNNER = CliRunner()


def test_a_folder_is_forecast_before_its_first_stage_has_run(home: Path, tmp_path: Path) -> None:
    first = tiny.recipe(home, tmp_path / "out" / "1")
    second = tiny.recipe(
        home,
        tmp_path / "out" / "2",
        train__language_model={"lr": 1e-3, "lora": {"rank": 2}},
        run__tokens_per_step=128,
    )
    second["model"] = {"from": str(tmp_path / "out" / "1")}
    tiny.write_recipe(tmp_path / "staged" / "1.yaml", first)
    tiny.write_recipe(tmp_path / "staged" / "2.yaml", second)
    console = Console(record=True, width=160, force_terminal=False)
    for cache in home.rglob("*.tokens-*.npz"):
        cache.unlink()
    assert forecast(tmp_path / "staged", [], console) == 0
    text = console.export_text()
    assert text.count("counting tokens of captions …") == 1  # the second stage has the same words
    assert text.index("counting tokens") < text.index("5 of 4 packs")
    assert "10 of 2 packs" in text
    assert "packing efficiency" in text
    assert text.count("100.00%") == 6  # one source: asked, got and tokens, in both stages
    assert "unreached:" not in text
    assert "slowest rank / mean" in text
    assert text.count(" of 2 ") == 3  # packs of the second stage's steps, and the waiting of both
    adapters = 2 * sum(
        2 * a for a in (24 + 24, 24 + 12, 24 + 12, 24 + 24, 24 + 36, 24 + 36, 36 + 24)
    )
    assert f"{adapters:,}" in text
    assert not (tmp_path / "out").exists()


def test_no_weights_are_read(home: Path, tmp_path: Path) -> None:
    """Neither of parts nor of a class of transformers: the files are no safetensors here."""
    values = tiny.recipe(home, tmp_path / "out")
    composite = save_llava_siglip(tmp_path / "llava")
    parts = {
        name: Path(shutil.copytree(section["path"], tmp_path / name))
        for name, section in values["model"].items()
        if "path" in section
    }
    for folder in (composite, *parts.values()):
        for file in folder.glob("*.safetensors"):
            file.write_bytes(b"")
    for name, folder in parts.items():
        values["model"][name]["path"] = str(folder)
    for model in (values["model"], {"from": str(composite)}):
        file = tiny.write_recipe(tmp_path / "r.yaml", {**values, "model": model})
        console = Console(record=True, width=160, force_terminal=False)
        assert forecast(file, [], console) == 0
        assert "packing efficiency" in console.export_text()


COMPOSITE_FOLDERS: dict[str, Callable[[Path], Path]] = {
    "blip-2": llava_folders.save_blip2,
    "gemma3": composite_folders.save_gemma3,
    "idefics3": composite_folders.save_idefics3,
    "internvl": composite_folders.save_internvl,
    "llava": llava_folders.save_llava,
    "llava_next": llava_folders.save_llava_next,
    "llava_onevision": llava_folders.save_llava_onevision,
    "smolvlm": partial(composite_folders.save_idefics3, name="smolvlm"),
    **{name: partial(save_qwen_vl, name=name) for name in KINDS},
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_kind_of_whole_model_is_forecast(home: Path, tmp_path: Path, name: str) -> None:
    """With weights of costs from the model itself: its tower runs without data."""
    values = tiny.recipe(home, tmp_path / "out", data__packing={"tokens": 512})
    values["model"] = {"from": str(COMPOSITE_FOLDERS[name](tmp_path / "whole"))}
    values["train"] = {"encoder": {"lr": 1e-3}, "connector": {"lr": 1e-3}}
    console = Console(record=True, width=160, force_terminal=False)
    file = tiny.write_recipe(tmp_path / "r.yaml", values)
    assert forecast(file, ["run.tokens_per_step=512"], console) == 0
    assert "slowest rank / mean" in console.export_text()


def test_documents_that_do_not_fit_are_named(home: Path, tmp_path: Path) -> None:
    values = tiny.recipe(
        home, tmp_path / "out", data__packing={"tokens": 24}, run__tokens_per_step=240
    )
    file = tiny.write_recipe(tmp_path / "r.yaml", values)
    console = Console(record=True, width=200, force_terminal=False)
    assert forecast(file, [], console) == 1
    text = console.export_text()
    assert "refused: captions captions-" in text
    assert "all in the run's ledger.jsonl" in text
    assert "training would stop: " in text
    assert "raise data.max_refused" in text


def test_a_training_that_would_stop_exits_with_1_after_all_is_printed(
    home: Path, tmp_path: Path
) -> None:
    good = tiny.recipe(home, tmp_path / "out")
    bad = tiny.recipe(home, tmp_path / "out", data__packing={"tokens": 24}, run__tokens_per_step=96)
    for name, values in (("1", bad), ("2", good)):
        values["run"]["output"] = str(tmp_path / "out" / name)
        tiny.write_recipe(tmp_path / "staged" / f"{name}.yaml", values)
    result = RUNNER.invoke(cli.app, ["plan", str(tmp_path / "staged")])
    assert result.exit_code == 1
    assert result.output.index("training would stop") < result.output.index("2.yaml")
    assert result.output.count("packing efficiency") == 2
    result = RUNNER.invoke(cli.app, ["plan", str(tmp_path / "staged" / "2.yaml")])
    assert result.exit_code == 0, result.output


def test_a_path_of_data_is_refused_before_anything_is_printed(home: Path, tmp_path: Path) -> None:
    file = tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe(home, tmp_path / "out"))
    wrong = str(tmp_path / "none-*.tar")
    result = RUNNER.invoke(cli.app, ["plan", str(file), f"data.sources.0.path={wrong}"])
    assert isinstance(result.exception, ValueError)
    assert f"data.sources.0.path: no shard matches {wrong}" in str(result.exception)
    assert result.output == ""


def test_unreached_documents_are_explained(home: Path, tmp_path: Path) -> None:
    values = tiny.recipe(home, tmp_path / "out", run__epochs=None, run__tokens=300)
    console = Console(record=True, width=80, force_terminal=False)
    forecast(tiny.write_recipe(tmp_path / "r.yaml", values), [], console)
    lines = console.export_text().splitlines()
    assert "  unreached: the run ends before them, or a weight below 1 leaves them out" in lines


def test_patches_that_hold_no_image_are_refused(home: Path, tmp_path: Path) -> None:
    values = tiny.recipe(home, tmp_path / "out", data__packing={"tokens": 64, "patches": 2})
    with pytest.raises(ValueError):
        forecast(tiny.write_recipe(tmp_path / "r.yaml", values), [], Console(record=True))
