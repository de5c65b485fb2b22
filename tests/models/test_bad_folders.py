"""Folders and options that `mllm assemble` refuses: one line each that names folder and field."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mllm.models.encoders import ENCODERS
from mllm.models.language import load_language_model
from mllm.models.weight_files import check_weight_files
from tests.models.conftest import change, encoder, language

Copy = Callable[[str], Path]

LANGUAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no width": ({"hidden_size": 0}, "config.json has hidden_size 0, which must be above 0; copy"),
    "below zero": ({"hidden_size": -8}, "config.json has hidden_size -8, which must be above 0"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0, which must be above 0"),
    "fewer layers": ({"num_hidden_layers": 1}, "9 weights of the language model have no place in"),
    "activation": ({"hidden_act": "gelux"}, "hidden_act 'gelux', an activation that transformers"),
    "rotary": ({"rope_scaling": {"type": "bar", "factor": 2.0}}, "'bar'"),
    "precision": ({"dtype": "float99"}, "no attribute 'float99'); copy the checkpoint's own"),
}


@pytest.mark.parametrize("case", LANGUAGE)
def test_a_language_model_that_its_configuration_does_not_fit(
    copy: Copy, refused: Callable[..., None], case: str
) -> None:
    values, message = LANGUAGE[case]
    folder = copy("llama")
    change(folder / "config.json", **values)
    refused(message, **language(folder))
    refused(str(folder), **language(folder))


def test_a_model_far_larger_than_its_weights_is_never_built(
    copy: Copy, refused: Callable[..., None]
) -> None:
    folder = copy("llama")
    change(folder / "config.json", intermediate_size=64 * 10**9)  # no machine has room for it
    refused("6 weights of the language model have another shape than", **language(folder))
    refused(
        "mlp.gate_proj.weight first ([64, 32] in the file, [64000000000, 32] by", **language(folder)
    )
    weights = load_file(folder / "model.safetensors")
    renamed = {f"older.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    refused("config.json describes a language model of ", **language(folder))
    refused(f"the files hold {sum(map(torch.numel, weights.values())):,}; take", **language(folder))


FAMILIES = (
    (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "intermediate_size": 64}),
    (OPTConfig, OPTForCausalLM, {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    (GPT2Config, GPT2LMHeadModel, {}),
)


@pytest.mark.parametrize(("config", "kind", "more"), FAMILIES)
def test_no_tokenizer_at_all(
    config: Any, kind: Any, more: dict[str, Any], tmp_path: Path, refused: Callable[..., None]
) -> None:
    folder = tmp_path / "bare"
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind(config(**sizes, **more)).save_pretrained(folder)
    refused(f"{folder}: the folder has no usable tokenizer (a letter such as", **language(folder))


def test_a_tokenizer_of_another_model(copy: Copy, refused: Callable[..., None]) -> None:
    folder = copy("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", "<y>"]})
    tokenizer.save_pretrained(folder)
    load_language_model(folder, weights=False)  # special tokens get rows
    tokenizer.add_tokens([f"word{number}" for number in range(40)])
    tokenizer.save_pretrained(folder)
    message = "has ids up to 341, the embedding has 300 rows (40 words without one); take"
    refused(message, **language(folder))


TEMPLATES = {
    "{{ raise_exception('no roles here') }}": "fails on every conversation (no roles here); copy",
    "{{ messages[0].nothing.at.all }}": "fails on every conversation ('dict object' has no",
    "always the same": "writes nothing of what a user says; copy the checkpoint's own",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_is_of_no_use(
    copy: Copy, refused: Callable[..., None], template: str
) -> None:
    folder = copy("llama")
    (folder / "chat_template.jinja").write_text(template)
    refused(f"{folder}: the chat template {TEMPLATES[template]}", **language(folder))


def in_shards(folder: Path) -> Path:
    """Cut a folder's weights into two files with an index; return the second."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number, name in enumerate(sorted(weights)):
        places[name] = f"model-0000{number % 2 + 1}-of-00002.safetensors"
    for file in set(places.values()):
        part = {name: weights[name] for name in weights if places[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_files_of_weights(copy: Copy, refused: Callable[..., None], name: str) -> None:
    folder = copy(name)
    given = language(folder) if name == "llama" else encoder(folder)
    weights = load_file(folder / "model.safetensors")
    shard = in_shards(folder)
    check_weight_files(folder, name)
    shard.write_bytes(shard.read_bytes()[:-9])
    refused(f"{folder}: {shard.name} is damaged or cut short", **given)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(f"{folder}: {shard.name} is a pointer of Git LFS", **given)
    shard.unlink()
    refused(f"{folder}: 1 of the 2 weights files that", **given)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(f"{folder}: model.safetensors.index.json has no weight_map", **given)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(f"{folder}: pytorch_model.bin is not read, only safetensors are", **given)
    kind: Any = AutoModelForCausalLM if name == "llama" else AutoModel  # as the message says
    kind.from_pretrained(folder).save_pretrained(folder)
    check_weight_files(folder, name)


ENCODER: dict[str, tuple[str, dict[str, Any], str]] = {
    "no heads": ("clip", {"num_attention_heads": 0}, "num_attention_heads 0, which must be above"),
    "heads": ("qwen2_5_vl", {"num_heads": 5}, "hidden_size 16, which is not a multiple of num_he"),
    "heads inside": ("qwen2_vl", {"num_heads": 5}, "embed_dim 16, which is not a multiple of num"),
    "activation": ("siglip", {"hidden_act": "gelux"}, "hidden_act 'gelux', an activation that"),
    "fewer layers": (
        "clip",
        {"num_hidden_layers": 2},
        "16 weights of the encoder have no place in",
    ),
    "stages": ("dinov2", {"num_hidden_layers": 2}, "cannot load encoder from"),
    "fewer blocks": ("qwen2_vl", {"depth": 2}, "12 weights of the encoder have no place in"),
}


@pytest.mark.parametrize("case", ENCODER)
def test_an_encoder_that_its_configuration_does_not_fit(
    copy: Copy, refused: Callable[..., None], case: str
) -> None:
    name, values, message = ENCODER[case]
    folder = copy(name)
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    whole.get("vision_config", whole).update(values)
    file.write_text(json.dumps(whole))
    refused(message, **encoder(folder, name))
    refused(str(folder), **encoder(folder, name))


def test_layers_that_are_left_out_on_purpose_are_no_mistake(folders: dict[str, Path]) -> None:
    for layer in (-3, -1):
        ENCODERS["clip"].from_folder(folders["clip"], layer=layer)


ABSURD: dict[str, tuple[dict[str, Any], str]] = {
    "factor": ({"connector": {"name": "pixel_shuffle", "factor": 9}}, "it can be 1 to 4"),
    "merger": ({"connector": {"name": "patch_merger", "factor": 5}}, "more than the 4 cells of a"),
    "edge": ({"images": {"tiling": "split", "longest_edge": 5}}, "is not between one tile of 32"),
    "tiles": ({"images": {"tiling": "dynamic", "tiles": 500}}, "tiles must be at most 64, got 500"),
    "grid": ({"images": {"tiling": "any_resolution", "grids": [[9, 9]]}}, "a grid of 81 tiles is"),
    "width": ({"connector": {"name": "mlp", "hidden": 10**12}}, "hidden must be at most 65,536"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_options_that_nobody_means(refused: Callable[..., None], case: str) -> None:
    changes, message = ABSURD[case]
    refused(message, **changes)


def test_neither_a_folder_nor_a_hub_to_ask(
    refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    begun = time.monotonic()
    message = "there is no folder models/clyp here, and as the id of a model on the hub it cannot"
    refused(message, **encoder(Path("models/clyp")))
    assert time.monotonic() - begun < 10
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("(HF_HUB_OFFLINE is set); correct the path", **language(Path("models/lama")))
