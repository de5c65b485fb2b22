"""Tiny random composites of transformers, saved as one finds them on disk, and what their own
processors make of a conversation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PillowImage
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from data_packing.document import Document, Image
from tests.models.conftest import llama_config, make_tokenizer

_PARTS = "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}"
CHATML_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}" + _PARTS + "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template that takes parts; IMAGE is replaced by what a family writes."""


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Make every weight random, the zeros and ones too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def tokenizer_with(*tokens: str, image: str, **named: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with special tokens and a chat template that writes images."""
    tokenizer = make_tokenizer(CHATML_PARTS.replace("IMAGE", repr(image)))
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if named:
        tokenizer._set_model_specific_special_tokens(named)
        tokenizer.init_kwargs.update(named)
    return tokenizer


def qwen2(**changes: Any) -> Qwen2Config:
    values = llama_config(vocab_size=320).to_dict()
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return Qwen2Config(
        **{name: values[name] for name in kept},
        num_key_value_heads=2,
        vocab_size=320,
        initializer_range=0.2,
        **{"tie_word_embeddings": True, "eos_token_id": 2, **changes},
    )


def save_internvl(folder: Path, **changes: Any) -> Path:
    """4 x 4 patches of 8 pixels, 4 tokens a tile, at most 6 tiles."""
    torch.manual_seed(21)
    tokens = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokenizer = tokenizer_with(
        *tokens,
        image="<IMG_CONTEXT>\n",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    values: dict[str, Any] = {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": [32, 32],
            "patch_size": [8, 8],
            "attention_bias": True,
        },
        "text_config": qwen2().to_dict(),
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "tie_word_embeddings": True,
    }
    config = InternVLConfig(**{**values, **changes})
    randomize(InternVLForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seen = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "crop_to_patches": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "max_patches": 6,
        "min_patches": 1,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
    }
    _save_json(folder / "preprocessor_config.json", seen)
    _save_json(
        folder / "processor_config.json",
        {"image_seq_length": 4, "processor_class": "InternVLProcessor"},
    )
    return folder


MARKS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def save_idefics3(folder: Path, name: str = "idefics3", **changes: Any) -> Path:
    """4 x 4 patches of 8 pixels, 4 tokens a tile, a long edge of 3 tiles."""
    torch.manual_seed(22)
    around = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokenizer = tokenizer_with("<image>", *around, *MARKS, image="<image>")
    text = llama_config(vocab_size=384, tie_word_embeddings=False).to_dict()
    values: dict[str, Any] = {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 32,
            "patch_size": 8,
        },
        "text_config": text,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
        "tie_word_embeddings": False,
    }
    values |= changes
    model: PreTrainedModel
    if name == "idefics3":
        model = Idefics3ForConditionalGeneration(Idefics3Config(**values))
    else:
        model = SmolVLMForConditionalGeneration(SmolVLMConfig(**values))
    randomize(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind = "Idefics3" if name == "idefics3" else "SmolVLM"
    seen = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": 32},
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 96},
    }
    _save_json(folder / "preprocessor_config.json", seen)
    whole = {"image_seq_len": 4, "processor_class": f"{kind}Processor"}
    _save_json(folder / "processor_config.json", whole)
    return folder


def save_gemma3(folder: Path, **changes: Any) -> Path:
    """4 x 4 patches of 8 pixels pooled to 4 tokens; the window ends before the text begins."""
    torch.manual_seed(23)
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = tokenizer_with(*names.values(), image="<start_of_image>", **names)
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 512,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "initializer_range": 0.2,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
    }
    values: dict[str, Any] = {
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "text_config": text,
        "mm_tokens_per_image": 4,
        "image_token_index": token(names["image_token"]),
        "boi_token_index": token(names["boi_token"]),
        "eoi_token_index": token(names["eoi_token"]),
    }
    config = Gemma3Config(**{**values, **changes})
    randomize(Gemma3ForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seen = {
        "image_processor_type": "Gemma3ImageProcessor",
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
    }
    _save_json(folder / "preprocessor_config.json", seen)
    whole = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    _save_json(folder / "processor_config.json", whole)
    return folder


def change_json(file: Path, **values: Any) -> None:
    """Set values of a JSON file; of values that are objects, some of theirs."""
    found = json.loads(file.read_text())
    for key, value in values.items():
        found[key] = {**found[key], **value} if isinstance(value, dict) else value
    _save_json(file, found)


def _save_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2))


def messages_of(document: Document) -> tuple[list[dict[str, Any]], list[PillowImage.Image]]:
    """A conversation as users of transformers write it: turns of parts, and the images."""
    turns: list[dict[str, Any]] = []
    pictures: list[PillowImage.Image] = []
    for part in document.parts:
        if not turns or turns[-1]["role"] != part.role:
            turns.append({"role": part.role, "content": []})
        if isinstance(part, Image):
            pictures.append(PillowImage.open(io.BytesIO(part.data)).convert("RGB"))
            turns[-1]["content"].append({"type": "image"})
        else:
            turns[-1]["content"].append({"type": "text", "text": part.text})
    return turns, pictures


def own_inputs(processor: Any, document: Document, prompt: bool = False) -> dict[str, Tensor]:
    """What their processor hands their model."""
    turns, pictures = messages_of(document)
    text = processor.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
    return dict(inputs)
