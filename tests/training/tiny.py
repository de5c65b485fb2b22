"""A random model of a few thousand weights and a handful of drawn images: a stage in seconds."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image as PillowImage
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from data_packing.document import Document, Image, Text
from data_packing.sharding import write_shards

SIDE = 8
PATCH = 4
COLOURS = {"red": (220, 30, 30), "green": (20, 190, 40), "blue": (30, 40, 230)}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_models(folder: Path, dropout: float = 0.0) -> None:
    """Write folder/llm and folder/clip."""
    torch.manual_seed(0)
    special = ["<pad>", "<s>", "<e>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    letters = [chr(i) for i in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<e>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    vision = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    preprocessor = {
        "size": {"height": SIDE, "width": SIDE},
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocessor))


EXPERTS: dict[str, tuple[type[PreTrainedConfig], dict[str, int]]] = {
    "mixtral": (MixtralConfig, {"intermediate_size": 20, "num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeConfig, {"moe_intermediate_size": 20, "num_experts": 4, "head_dim": 12}),
    "olmoe": (OlmoeConfig, {"intermediate_size": 20, "num_experts": 4}),
}
"""Language models with experts: configuration, and what they need beside the usual sizes."""


def make_experts(folder: Path) -> None:
    """Write a folder for each of EXPERTS, with the tokenizer of folder/llm."""
    torch.manual_seed(1)
    plain = AutoConfig.from_pretrained(folder / "llm")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id")
    shared = {name: getattr(plain, name) for name in (*sizes, *more, "pad_token_id")}
    for name, (kind, own) in EXPERTS.items():
        config = kind(**shared, **own, num_experts_per_tok=2, initializer_range=0.1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "llm").save_pretrained(folder / name)


def picture(colour: str, seed: int) -> bytes:
    """A PNG in one colour, with a little noise."""
    noise = np.random.default_rng(seed).integers(-20, 20, (SIDE, SIDE, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def captions(count: int, source: str = "captions") -> Iterator[Document]:
    """Pictures and their colours."""
    names = list(COLOURS)
    for i in range(count):
        colour = names[i % len(names)]
        text = f"{colour} square {'x' * (i * 7 % 13)}"
        image = Image.from_bytes(picture(colour, i))
        yield Document((image, Text(text)), source=source, key=f"{source}-{i:04d}")


def texts(count: int, source: str = "texts") -> Iterator[Document]:
    """Documents without any image."""
    for i in range(count):
        words = f"a text of no picture {'y' * (i * 5 % 17)}"
        yield Document((Text(words),), source=source, key=f"{source}-{i:04d}")


BROKEN_KEY = "broken-0004"


def broken(count: int) -> Iterator[Document]:
    """Captions, one of them with a picture that ends too early."""
    for document in captions(count, "broken"):
        if document.key == BROKEN_KEY:
            image, text = document.parts
            assert isinstance(image, Image)
            cut = Image.from_bytes(image.data[: len(image.data) // 2])
            document = Document((cut, text), source=document.source, key=document.key)
        yield document


TRAPS = {4: "#", 13: "%", 18: "#"}
"""Which of `trapped` hold what."""


def trapped(count: int) -> Iterator[Document]:
    """Captions, some with a letter that the objective `traps` cannot bear."""
    for i, document in enumerate(captions(count, "traps")):
        image, text = document.parts
        assert isinstance(text, Text)
        parts = (image, Text(text.text + TRAPS.get(i, "")))
        yield Document(parts, source=document.source, key=document.key)


def make_data(folder: Path, count: int = 48) -> None:
    """Write the shards captions-000000.tar, texts-, broken- and traps-000000.tar.

    The captions are there a second time in shards of six, small-000000.tar and on.
    """
    write_shards(captions(count), folder, "captions")
    write_shards(texts(count // 2), folder, "texts")
    write_shards(broken(count // 2), folder, "broken")
    write_shards(trapped(count // 2), folder, "traps")
    write_shards(captions(count, "small"), folder, "small", 6)


def make_all(folder: Path, count: int = 48) -> Path:
    """Models and data. Returns the folder."""
    make_models(folder)
    make_experts(folder)
    make_data(folder / "data", count)
    return folder


def recipe(home: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A small stage as plain values; `changes` are `section__key=value`."""
    values: dict[str, Any] = {
        "model": {
            "encoder": {"name": "clip", "path": str(home / "clip")},
            "connector": {"name": "mlp"},
            "language_model": {"path": str(home / "llm")},
        },
        "train": {
            "encoder": "frozen",
            "connector": {"lr": 1e-2},
            "language_model": {"lr": 3e-3},
        },
        "data": {
            "sources": [{"path": str(home / "data" / "captions-*.tar")}],
            "packing": {"tokens": 64},
            "workers": 0,
        },
        "optimizer": {"weight_decay": 0.1, "warmup": 0.1},
        "run": {
            "epochs": 1,
            "tokens_per_step": 256,
            "precision": "fp32",
            "zero": 2,
            "output": str(output),
        },
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        here = values
        for key in path:
            here = here.setdefault(key, {})
        here[last] = value
    return values


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """Write a recipe file. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
