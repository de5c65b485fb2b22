"""`mllm export` to classes of transformers, by name or where a model came from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_packing.document import Document
from mllm.cli import main
from mllm.export import EXPORTS
from mllm.export.adapter import HOLDERS
from mllm.models.assemble import assemble, load
from mllm.models.composites import COMPOSITES
from tests.export.outsider import ask, here, save_pictures
from tests.export.stages import save_stage
from tests.models.conftest import picture
from tests.models.llava_folders import save_blip2, save_llava_siglip


def run(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mllm", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        main()


def test_every_composite_can_be_named() -> None:
    assert {one.name for one in COMPOSITES.values()} < set(EXPORTS)
    assert set(HOLDERS) == set(EXPORTS)


@pytest.mark.parametrize(("name", "save"), [("llava", save_llava_siglip), ("blip2", save_blip2)])
def test_a_stage_goes_back_to_the_class_it_began_from(
    name: str, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = save_stage(load(save(tmp_path / "source")), tmp_path / "stage")
    run("export", stage, tmp_path / "merged", monkeypatch=monkeypatch)
    run("export", stage, tmp_path / "apart", "--adapter", monkeypatch=monkeypatch)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == {"llava": "llava", "blip2": "blip-2"}[name]
    model, processor = load(stage)
    pixels = processor.prompt(Document.caption(picture(3), "the cat sat"))
    own = AutoProcessor.from_pretrained(tmp_path / "merged")
    squares = model.encoder.squares(pixels["pixels"], pixels["sizes"])
    inputs = {
        "input_ids": pixels["input_ids"],
        "pixel_values": model.encoder.normalised(squares).permute(0, 3, 1, 2),
    }
    merged: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    apart: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "apart").eval()
    with torch.no_grad():
        wanted = model(**pixels).logits
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=0, atol=1e-5)
        assert (apart(**inputs).logits - wanted).abs().max() > 1e-2
        tuned: Any = PeftModel.from_pretrained(apart, str(tmp_path / "apart" / "adapter")).eval()
        torch.testing.assert_close(tuned(**inputs).logits, wanted, rtol=0, atol=1e-5)
    assert own.image_processor.size["height"] == 32


def test_their_folder_is_converted_to_another_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_llava_siglip(tmp_path / "source")
    run("export", folder, tmp_path / "out", "--to", "llava", monkeypatch=monkeypatch)
    first, second = load(folder)[0].state_dict(), load(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_an_origin_the_format_must_be_said(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllm", "origin": ""}))
    monkeypatch.setattr(sys, "argv", ["mllm", "export", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "assembled from parts; give --to: transformers, blip2, " in " ".join(
        capsys.readouterr().err.split()
    )


def test_blip_2_s_tower_is_exported_with_its_class_token(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    parts = {
        "encoder": {"name": "blip2", "path": folders["blip2"]},
        "connector": {"name": "q_former", "path": str(folders["blip2"])},
        "language_model": {"path": folders["llama"]},
    }
    model, processor = assemble(parts)
    pictures = save_pictures(tmp_path)
    EXPORTS["transformers"](model, processor, tmp_path / "out")
    request = {"folder": str(tmp_path / "out"), "adapter": None, "images": pictures, "again": ""}
    found = ask(tmp_path, {"1": request})["1"]
    own = here(model, processor, pictures)["logits"]
    torch.testing.assert_close(found["logits"], own, rtol=0, atol=1e-5)
