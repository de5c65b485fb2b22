"""InternVL: read from its class's folder, trained, written into it again, loaded without us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.models.assemble import assemble
from mllm.models.composites.internvl import INTERNVL, read, write
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.composite_checks import (
    check_alone,
    check_packed,
    check_read,
    load_alone,
    same_weights,
    train_a_step,
)
from tests.models.composite_folders import change_json, save_internvl
from tests.models.conftest import save_language_model

Parts = tuple[MultimodalModel, Processor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_internvl(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


def from_parts(tower: Path, language_model: Path, **changes: dict[str, Any]) -> Parts:
    """Assembled here, in the shape of the class."""
    section: dict[str, Any] = {
        "encoder": {"name": "internvl", "path": tower},
        "connector": {"name": "pixel_shuffle"},
        "language_model": {"path": language_model},
        "images": {"tiling": "dynamic", "tiles": 4},
    }
    torch.manual_seed(5)
    return assemble({**section, **changes})


def test_reads_what_its_own_class_computes(folder: Path) -> None:
    model, processor = read(folder, torch.float32)
    assert model.config.origin == INTERNVL.name == "internvl"
    assert not model.training
    check_read("internvl", folder, model, processor)
    check_packed(model, processor)


def test_a_stage_begins_from_it(folder: Path) -> None:
    model, processor = assemble({"from": folder, "images": {"tiles": 2}})
    assert model.config.origin == "internvl"
    assert processor.images == {"tiling": "dynamic", "tiles": 2, "min_tiles": 1}
    with pytest.raises(ValueError, match="cannot become"):
        assemble({"from": folder, "connector": {"factor": 4}})


def test_an_inner_layer_is_read_and_written(folder: Path, tmp_path: Path) -> None:
    """The layers above are not built, and a tower with a last norm loses it."""
    changes = {"vision_feature_layer": -2, "tie_word_embeddings": False}
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    deeper = save_internvl(
        tmp_path / "a", vision_config={**vision, "use_mean_pooling": False}, **changes
    )
    model, processor = read(deeper, torch.float32)
    check_read("internvl", deeper, model, processor)
    write(model, processor, tmp_path / "b")
    again, processor = read(tmp_path / "b", torch.float32)
    check_read("internvl", tmp_path / "b", model, processor)
    assert again.config.encoder["config"]["num_hidden_layers"] == 2


def test_written_folders_load_without_us(
    folder: Path, language_model: Path, tmp_path: Path
) -> None:
    """One read and trained; one assembled; one that does not cut; one of a stage's folder."""
    trained = read(folder, torch.float32)
    train_a_step(*trained)
    made = {
        "trained": trained,
        "assembled": from_parts(folder, language_model),
        "whole": from_parts(folder, language_model, images={}),
    }
    for key, (model, processor) in made.items():
        write(model, processor, tmp_path / key)
    found = load_alone({key: (tmp_path / key, "internvl") for key in made}, tmp_path)
    for key, (model, processor) in made.items():
        check_alone(found, key, model, processor)
    assert same_weights(trained[0], read(tmp_path / "trained", torch.float32)[0])


def test_a_round_trip_changes_nothing(folder: Path, tmp_path: Path) -> None:
    model, processor = read(folder, torch.float32)
    write(model, processor, tmp_path / "a")
    again, processor_again = read(tmp_path / "a", torch.float32)
    assert same_weights(model, again)
    assert processor.fingerprint == processor_again.fingerprint
    assert model.config.to_dict() == again.config.to_dict()


def test_our_own_folder_keeps_it(folder: Path, tmp_path: Path) -> None:
    """Saved as a stage's folder and loaded, it is still what it was read from."""
    model, processor = read(folder, torch.float32)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert same_weights(model, again)
    assert again.config.origin == "internvl"
    assert Processor.from_pretrained(tmp_path).fingerprint == processor.fingerprint


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"downsample_ratio": 0.3}, "downsample_ratio"),
        ({"vision_feature_layer": [1, 2]}, "features of several layers"),
        ({"vision_feature_select_strategy": "full"}, "keeps the class token"),
        ({"projector_hidden_act": "relu"}, "only gelu"),
        ({"vision_config": {"image_size": [32, 64]}}, "only squares"),
    ],
)
def test_refuses_a_folder(
    folder: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=match) as caught:
        read(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


def test_refuses_a_damaged_folder(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read(tmp_path, torch.float32)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    names = {key: value for key, value in names.items() if "image" not in key}
    names.pop("model_specific_special_tokens", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match="names no context_image_token"):
        read(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"connector": {"name": "mlp"}}, "the connector mlp"),
        ({"connector": {"name": "pixel_shuffle", "layers": 1}}, "layers 1"),
        ({"connector": {"name": "pixel_shuffle", "hidden": 24}}, "hidden 24"),
        ({"connector": {"name": "pixel_shuffle", "factor": 3}}, "powers of 2"),
        ({"images": {"tiling": "split"}}, "tiling split"),
        ({"images": {"tiling": "dynamic", "thumbnail": False}}, "thumbnail: false"),
    ],
)
def test_refuses_parts_that_it_has_no_place_for(
    folder: Path, language_model: Path, tmp_path: Path, parts: dict[str, Any], match: str
) -> None:
    model, processor = from_parts(folder, language_model, **parts)
    refused(model, processor, tmp_path / "out", match)


def test_refuses_another_fusion(folder: Path, language_model: Path, tmp_path: Path) -> None:
    fusion = {"name": "cross_attention"}
    model, processor = from_parts(folder, language_model, fusion=fusion, images={})
    refused(model, processor, tmp_path / "out", "fusion is cross_attention")


def test_refuses_another_tower(build: Callable[..., Parts], tmp_path: Path) -> None:
    refused(*build("siglip", "pixel_shuffle"), tmp_path / "out", "the encoder siglip")


def refused(model: MultimodalModel, processor: Processor, folder: Path, match: str) -> None:
    """In one line, and before anything is written."""
    with pytest.raises(ValueError, match=match) as caught:
        write(model, processor, folder)
    assert "\n" not in str(caught.value)
    assert not folder.exists()
