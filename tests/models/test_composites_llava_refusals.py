"""What of LLaVA's classes cannot be read, and what cannot be written as one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from mllm.models.assemble import assemble, load
from mllm.models.composites import COMPOSITES
from tests.models import llava_folders
from tests.models.conftest import SMALL, make_tokenizer
from tests.models.llava_folders import SAVERS


@pytest.mark.parametrize(
    ("save", "changes", "message"),
    [
        ("llava", {"vision_feature_layer": [-2, -3]}, "several layers side by side"),
        ("llava", {"vision_feature_layer": -9}, "no such layer"),
        ("llava", {"vision_feature_select_strategy": "full"}, "keeps the class token"),
        ("llava", {"projector_hidden_act": "relu"}, "a projector with relu"),
        ("llava_siglip", {"vision_feature_select_strategy": "default"}, "cuts off a patch"),
        ("llava_next", {"image_grid_pinpoints": [[32, 50]]}, "not whole tiles of 32 pixels"),
        ("llava_next", {"image_grid_pinpoints": [[32]]}, r"\[height, width\]; copy the"),
        ("llava_next", {"image_grid_pinpoints": 32}, "image_grid_pinpoints is 32, which is of no"),
        ("llava", {"image_token_index": -5}, "images are the token -5, but the tokenizer has"),
        ("llava", {"text_config": None}, "config.json has no text_config, which says"),
        ("llava_next", {"vision_config": None}, "config.json has no vision_config, which says"),
        ("llava_onevision", {"vision_aspect_ratio": "square"}, "vision_aspect_ratio 'square'"),
        ("llava", {"image_token_index": 319}, "images are the token 319"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, save: str, changes: dict[str, Any], message: str
) -> None:
    folder = SAVERS[save](tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_another_tower_is_not_read(tmp_path: Path) -> None:
    folder = llava_folders.save_llava(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {"model_type": "pixtral"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a vision tower of type 'pixtral'"):
        load(folder)


def test_tiles_that_are_scaled_and_cut_again_are_not_read(tmp_path: Path) -> None:
    folder = llava_folders.save_llava_next(tmp_path)
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "size": {"shortest_edge": 40}}))
    with pytest.raises(ValueError, match="scales tiles to 40 pixels and cuts 32"):
        load(folder)


def test_onevision_leaves_out_grids_that_it_would_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor = load(llava_folders.save_llava_onevision(tmp_path))[1]
    grids = processor.geometry.grids  # type: ignore[attr-defined]
    assert "at most 9 tiles" in caplog.text
    assert {(3, 3), (2, 4)} < set(grids)
    assert (3, 4) not in grids


def test_llava_s_own_padding_is_not_read(tmp_path: Path) -> None:
    folder = llava_folders.save_llava(tmp_path)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_pad": True}))
    with pytest.raises(ValueError, match="do_pad"):
        load(folder)


def test_missing_and_torn_weights_are_named(tmp_path: Path) -> None:
    folder = llava_folders.save_llava_siglip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "linear_1" in name)
    save_file(
        {k: v for k, v in weights.items() if k != name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        ValueError, match="1 weights of LlavaForConditionalGeneration are missing.*; take"
    ):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="damaged or cut short"):
        load(folder)


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fuyu"}))
    with pytest.raises(ValueError, match="'fuyu' model, neither one .* to begin from .*llava"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("to", "encoder", "options", "connector", "message"),
    [
        ("llava", "dinov2", {}, {"norm": False}, "the encoder dinov2 cannot be written"),
        ("llava", "siglip", {"layer": -1}, {"norm": False}, "before their final normalisation"),
        ("llava", "clip", {"resize": "pad"}, {"norm": False}, "padded to squares here"),
        ("llava", "clip", {}, {"hidden": 8, "norm": False}, "as wide as the language model, 32"),
        ("llava", "clip", {}, {}, "has a LayerNorm before it"),
        ("llava", "clip", {}, {"name": "linear"}, "has linear"),
        ("llava", "clip", {}, {"name": "q_former"}, "has q_former"),
        ("llava_next", "clip", {}, {"norm": False}, "cuts images by none"),
    ],
)
def test_what_cannot_be_written(
    folders: dict[str, Path],
    tmp_path: Path,
    to: str,
    encoder: str,
    options: dict[str, Any],
    connector: dict[str, Any],
    message: str,
) -> None:
    name = connector.get("name", "mlp")
    model, processor = assemble(
        {
            "encoder": {"name": encoder, "path": folders[encoder], **options},
            "connector": {"name": name, **SMALL.get(name, {}), **connector},
            "language_model": {"path": folders["llama"]},
        }
    )
    with pytest.raises(ValueError, match=message):
        COMPOSITES[to].write(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "images", "message"),
    [
        ("llava", {"tiling": "dynamic"}, "no tiles, this model cuts images by dynamic"),
        ("llava", {"regions": "feature"}, "no features of regions"),
    ],
)
def test_tilings_that_cannot_be_written(
    folders: dict[str, Path], tmp_path: Path, to: str, images: dict[str, Any], message: str
) -> None:
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp", "norm": False},
            "language_model": {"path": folders["llama"]},
            "images": images,
        }
    )
    with pytest.raises(ValueError, match=message):
        COMPOSITES[to].write(model, processor, tmp_path / "out")


@pytest.mark.parametrize("to", ["llava", "blip-2"])
def test_other_fusions_cannot_be_written(folders: dict[str, Path], tmp_path: Path, to: str) -> None:
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp", "norm": False},
            "language_model": {"path": folders["llama"]},
            "fusion": {"name": "cross_attention"},
        }
    )
    with pytest.raises(ValueError, match="this model's fusion is cross_attention"):
        COMPOSITES[to].write(model, processor, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "message"), [("cohere", "scales or caps its logits"), ("phi", "has a bias")]
)
def test_language_models_that_cannot_be_written(
    folders: dict[str, Path], tmp_path: Path, family: str, message: str
) -> None:
    sizes = {k: v for k, v in llava_folders.TEXT.items() if k != "num_key_value_heads"}
    kind, config = {
        "cohere": (CohereForCausalLM, CohereConfig),
        "phi": (PhiForCausalLM, PhiConfig),
    }[family]
    more = {"logit_scale": 0.5} if family == "cohere" else {}
    kind(config(**sizes, **more)).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp", "norm": False},
            "language_model": {"path": tmp_path / "lm"},
        }
    )
    with pytest.raises(ValueError, match=message):
        COMPOSITES["llava"].write(model, processor, tmp_path / "out")
