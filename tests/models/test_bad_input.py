"""What people get wrong with `mllm assemble`: one line each that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm.models.assemble import assemble as build
from tests.models.conftest import change, encoder, language, save_language_model

FROM = {"encoder": None, "connector": None, "language_model": None}
Copy = Callable[[str], Path]


def test_the_wrong_folder(
    folders: dict[str, Path], tmp_path: Path, refused: Callable[..., None]
) -> None:
    llama, clip, empty = folders["llama"], folders["clip"], tmp_path / "empty"
    empty.mkdir()
    refused("a language model goes to model.language_model", **encoder(llama))
    refused("not ClipEncoder; give encoder.name: siglip", **encoder(folders["siglip"]))
    refused("holds a 'llama' model, not an", **encoder(llama, "efficientnet_lite"))
    refused("not one of timm", **encoder(llama, "timm"))
    refused("encoders go to model.encoder", **language(clip))
    refused("encoders go to model.encoder", **language(folders["dinov2"]))
    other = "does not know the model type 'efficientnet_lite' of its config.json"
    refused(other, **language(folders["efficientnet_lite"]))
    no_model = f"the folder {empty} has no config.json, so it holds no model"
    refused(f"model.encoder.path: {no_model}", **encoder(empty))
    refused(f"model.language_model.path: {no_model}", **language(empty))
    refused(f"model.from: {no_model}", **FROM, **{"from": str(empty)})
    a_file = "is a file; give the folder that holds the model"
    refused(a_file, **encoder(clip / "config.json"))
    refused(a_file, **language(llama / "model.safetensors"))
    refused("give it as language_model or encoder", **FROM, **{"from": str(llama)})
    q_former = {"connector": {"name": "q_former", "path": str(llama)}}
    refused("holds a 'llama' model, not a BLIP-2", **q_former)


def test_unknown_parts(folders: dict[str, Path], refused: Callable[..., None]) -> None:
    refused("did you mean 'siglip'", **encoder(folders["siglip"], "sigclip"))
    refused("did you mean 'q_former'", connector={"name": "qformer"})
    refused("did you mean 'dynamic'", images={"tiling": "dinamic"})
    refused("unknown key 'model.langage_model'", langage_model={"path": "x"})


LANGUAGE: dict[str, tuple[dict[str, Any], str]] = {
    "narrower": ({"hidden_size": 64}, "20 weights of the language model have another shape than"),
    "words": ({"vocab_size": 280}, "has ids up to 299, the embedding has 280 rows (20 words"),
    "layers": ({"num_hidden_layers": 3}, "9 weights are missing, model.layers.2"),
    "heads": ({"num_attention_heads": 5}, "5, which is not a multiple of num_key_value_heads (2);"),
    "type": ({"hidden_size": "many"}, "config.json makes no sense: Field 'hidden_size' expected"),
    "kind": ({"model_type": "lama"}, "transformers does not know the model type 'lama'"),
    "no kind": ({"model_type": None}, "Should have a `model_type` key in its config.json"),
}


@pytest.mark.parametrize("case", LANGUAGE)
def test_a_language_model_that_its_configuration_does_not_fit(
    copy: Copy, refused: Callable[..., None], case: str
) -> None:
    values, message = LANGUAGE[case]
    folder = copy("llama")
    change(folder / "config.json", **values)
    refused(message, **language(folder))


def test_a_language_model_whose_files_are_damaged(copy: Copy, refused: Callable[..., None]) -> None:
    folder = copy("llama")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}\n{% for message in messages %}")
    refused("line 2 of the chat template is no Jinja", **language(folder))
    (folder / "chat_template.jinja").unlink()
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[:500])
    refused(f"{folder}: tokenizer.json is no valid JSON (Unterm", **language(folder))
    refused("so damaged or cut short; copy or download it again", **language(folder))
    (folder / "tokenizer.json").unlink()
    refused("its tokenizer cannot be read; copy the checkpoint's", **language(folder))
    (folder / "tokenizer.json").write_text(text)
    weights = folder / "model.safetensors"
    for size in (-9, 0):
        weights.write_bytes(weights.read_bytes()[:size])
        refused("model.safetensors is damaged or cut short", **language(folder))
    weights.unlink()
    refused("no file model.safetensors, so there are no weights; copy", **language(folder))
    (folder / "config.json").write_text("{")
    refused("is not a valid JSON file", **language(folder))


def test_an_encoder_and_its_preprocessor(copy: Copy, refused: Callable[..., None]) -> None:
    folder = copy("clip")
    file = folder / "preprocessor_config.json"
    text = file.read_text()
    change(file, size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    refused("makes 64 pixels, the encoder takes 32; take both files", **encoder(folder))
    file.unlink()
    refused("which says how images are prepared; copy it from the", **encoder(folder))
    file.write_text(text)
    change(folder / "config.json", num_attention_heads=3)
    refused(
        "hidden_size 16, which is not a multiple of num_attention_heads (3);", **encoder(folder)
    )
    change(folder / "config.json", num_attention_heads=2, hidden_size=32)
    refused("weights of the encoder have another shape than config.json", **encoder(folder))


LITE: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"image_size": None}, "image_size is None, which is no square"),
    "a word": ({"image_size": "big"}, "image_size is 'big', which is no square"),
    "no filter": ({"resample": 9}, "has resample: 9; give a filter: 0 nearest"),
    "no colours": ({"image_mean": [1]}, "has image_mean: [1]; three numbers"),
    "no rule": ({"resize": None}, "unknown resize rule ''"),
}


@pytest.mark.parametrize("case", LITE)
def test_a_preprocessor_of_efficientnet(
    copy: Copy, refused: Callable[..., None], case: str
) -> None:
    values, message = LITE[case]
    folder = copy("efficientnet_lite")
    change(folder / "preprocessor_config.json", **values)
    refused(message, **encoder(folder, "efficientnet_lite"))


def test_weights_of_another_efficientnet(copy: Copy, refused: Callable[..., None]) -> None:
    folder = copy("efficientnet_lite")
    change(folder / "config.json", variant="efficientnet-lite4")
    message = "does not hold the weights of efficientnet-lite4: 456 are missing, of another shape"
    refused(message, **encoder(folder, "efficientnet_lite"))


def test_a_connector_that_does_not_fit(refused: Callable[..., None]) -> None:
    for name in ("average_pool", "c_abstractor"):
        message = "visual_tokens 144 is a 12 x 12 grid, but the encoder gives 4 x 4 cells"
        refused(message, connector={"name": name, "visual_tokens": 144})


@pytest.fixture
def saved(folders: dict[str, Path], tmp_path: Path) -> Path:
    """An assembled folder to spoil."""
    model, processor = build(
        {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp"},
            "language_model": {"path": folders["llama"]},
        }
    )
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_model_whose_files_do_not_go_together(
    saved: Path, refused: Callable[..., None]
) -> None:
    start = {**FROM, "from": str(saved)}
    file, weights = saved / "processor_config.json", load_file(saved / "model.safetensors")
    text = file.read_text()
    change(file, connector={"name": "average_pool", "visual_tokens": 4})
    refused("connector.name 'mlp', but processor_config.json 'average_pool'; take both", **start)
    geometry = {**json.loads(text)["geometry"], "cells": 2}
    change(file, connector={"name": "mlp"}, geometry=geometry)
    refused("config.json says geometry.cells 4, but processor_config.json 2; take", **start)
    file.write_text("{}")
    refused("cannot load processor from", **start)
    file.write_text(text)
    key = "connector.first.weight"
    changed = {**weights, key: torch.zeros(3)}
    save_file(changed, saved / "model.safetensors", {"format": "pt"})
    refused("weights have another shape than config.json says; take both files", **start)
    change(saved / "config.json", encoder={})
    refused("config.json says geometry.cells None", **start)


def test_a_tokenizer_without_a_template_is_no_mistake(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_language_model(tmp_path / "base", chat_template=None)
    parts = {"encoder": {"name": "clip", "path": folders["clip"]}, "connector": {"name": "mlp"}}
    build({**parts, "language_model": {"path": folder}})
