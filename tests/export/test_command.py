"""`mllm export`: what it writes, what it refuses, and the adapter kept apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.cli import main
from mllm.export import EXPORTS
from mllm.export.command import write
from mllm.export.transformers import check, source
from mllm.models.assemble import load
from mllm.models.fusion import FUSIONS
from mllm.models.native import NativeGeometry
from tests.export.outsider import ask, here, save_pictures
from tests.export.stages import save_stage
from tests.models.conftest import open_gates

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stage(build: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A stage's folder with a trained adapter, merged and apart; its parameter is a fusion."""
    model, processor = build(fusion=getattr(request, "param", "in_sequence"))
    open_gates(model)
    return save_stage((model, processor), tmp_path / "stage")


def run(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mllm", *map(str, arguments)])
    main()


@pytest.mark.parametrize("stage", FUSIONS, indirect=True)
def test_the_adapter_apart_and_merged_give_the_stage_s_logits(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, extra in (("apart", ["--adapter"]), ("merged", [])):
        options = ["--to", "transformers", *extra]
        with pytest.raises(SystemExit, match="0"):
            run("export", stage, tmp_path / name, *options, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert f"PeftModel.from_pretrained(model, {str(tmp_path / 'apart' / 'adapter')!r})" in printed
    pictures = save_pictures(tmp_path)
    own = here(*load(stage), pictures)["logits"]
    common = {"images": pictures, "again": ""}
    requests = {
        "1": {"folder": str(tmp_path / "apart"), "adapter": str(tmp_path / "apart/adapter")},
        "2": {"folder": str(tmp_path / "merged"), "adapter": None},
    }
    found = ask(tmp_path, {name: {**request, **common} for name, request in requests.items()})
    assert "error" not in found["1"], found["1"]["error"]
    assert (found["1"]["logits"] - own).abs().max() > 1e-2
    torch.testing.assert_close(found["1"]["adapted"], own, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["2"]["logits"], own, rtol=0, atol=1e-5)


def test_what_cannot_be_written_is_refused_in_one_line(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown export 'transfomers'; did you mean"):
        write(stage, "transfomers", tmp_path / "out")
    with pytest.raises(ValueError, match=r"stage is there already and not empty"):
        write(stage, "transformers", stage)
    with pytest.raises(ValueError, match="--dtype int8 is not known"):
        write(stage, "transformers", tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match=r"in bfloat16.*give --dtype float32"):
        write(stage, "transformers", tmp_path / "out", dtype="bfloat16", adapter=True)
    config = json.loads((stage / "lora" / "adapter_config.json").read_text())
    (stage / "lora" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="DoRA cannot be taken out of merged weights"):
        write(stage, "transformers", tmp_path / "out", adapter=True)
    (stage / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="this stage was trained without LoRA"):
        write(stage, "transformers", tmp_path / "out", adapter=True)
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_nothing_is_left_when_an_exporter_refuses(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, processor: Any, folder: Path) -> None:
        (folder / "half").write_text("written")
        raise ValueError("cannot hold it")

    monkeypatch.setitem(EXPORTS, "refusing", refuse)
    with pytest.raises(ValueError, match="cannot hold it"):
        write(stage, "refusing", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_weights_are_written_in_the_dtype_that_is_asked_for(stage: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(stage, "transformers", tmp_path / "out", dtype="bfloat16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_boxes_as_text_need_nothing(build: Callable[..., Any]) -> None:
    model, processor = build(images={"regions": "thousandths", "clip_tokens": 99})
    check(model, processor)
    assert "TILINGS" not in source(model, processor)


@pytest.mark.parametrize(
    ("encoder", "connector", "images", "fusion"),
    [
        ("clip", "mlp", {}, "in_sequence"),
        ("dinov3_vit", "q_former", {"tiling": "dynamic"}, "in_sequence"),
        ("efficientnet_lite", "c_abstractor", {}, "in_sequence"),
        ("siglip", "average_pool", {"tiling": "any_resolution"}, "in_sequence"),
        ("dinov2", "pixel_shuffle", {"tiling": "split"}, "in_sequence"),
        ("qwen2_5_vl", "patch_merger", {}, "in_sequence"),
        ("siglip2_naflex", "mlp", {}, "in_sequence"),
        ("clip", "linear", {}, "cross_attention"),
        ("qwen3_vl", "patch_merger", {}, "deepstack"),
        ("clip", "mlp", {"tiling": "any_resolution"}, "deepstack"),
        ("clip", "mlp", {"tiling": "any_resolution"}, "cross_attention"),
    ],
)
def test_the_file_reads_as_a_person_s(
    encoder: str,
    connector: str,
    images: dict[str, Any],
    fusion: str,
    build: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model, processor = build(encoder, connector, images=images, fusion=fusion)
    text = source(model, processor)
    file = tmp_path / "modeling.py"
    file.write_text(text)
    options = ["--no-cache", "--config", str(ROOT / "pyproject.toml")]
    for command in (["check"], ["format", "--check", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command, *options, str(file)]
        result = subprocess.run(ruff, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    native = isinstance(model.encoder.geometry, NativeGeometry)
    assert ("class ImageGeometry" in text) is not native
    for word in ("import mllm", "from mllm", "data_packing", "load_weights", "type: ignore"):
        assert word not in text
    other = {"q_former": "Resampler", "c_abstractor": "QFormer"}.get(connector, "QFormer")
    assert f"class {other}" not in text
    assert ("class Newline" in text) == hasattr(model.connector, "newline")
    assert ("class CrossAttention" in text) == (fusion == "cross_attention")
    assert ("class DeepStack" in text) == (fusion == "deepstack")
    assert ("def hooked" in text) == ("self.fusion" in text) == (fusion != "in_sequence")
    for word in ("flash_attn_varlen_func", "untouched", "def work", "check_options"):
        assert word not in text
