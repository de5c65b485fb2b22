"""Folders of LLaVA's classes and of BLIP-2 as one finds them on disk, tiny and random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.models.conftest import CHATML, make_tokenizer

VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Takes parts, puts images first, and leaves the begin token to the tokenizer."""

GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
SQUARE = {"height": 32, "width": 32}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def randomised(model: PreTrainedModel, scale: float = 0.2) -> PreTrainedModel:
    """Make every weight random, norms and biases too: nothing equals by being zero or one."""
    torch.manual_seed(8)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * scale)
    return model.eval()


def tokenizer_with_begin(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, which adds its begin token, and `<image>` as LLaVA's have it."""
    tokenizer = make_tokenizer(chat_template)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    begin = ("<|im_start|>", 1)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[begin]
    )
    return tokenizer


def _config(kind: type[PreTrainedConfig], tower: dict[str, Any], text: str, **more: Any) -> Any:
    tied = more.get("tie_word_embeddings", False)
    return kind(
        vision_config=tower,
        text_config={**TEXT, "model_type": text, "tie_word_embeddings": tied},
        image_token_index=300,
        **more,
    )


def _preprocessor(folder: Path, name: str, processor: dict[str, Any], **values: Any) -> None:
    pixels = {
        "image_processor_type": name,
        "resample": 3,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        **values,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    (folder / "processor_config.json").write_text(json.dumps(processor))


def save_llava(folder: Path, **changes: Any) -> Path:
    """CLIP's last layer but one, Llama with tied embeddings; in shards, under older names."""
    config = _config(LlavaConfig, CLIP, "llama", **{"tie_word_embeddings": True, **changes})
    model = randomised(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder, max_shard_size="40KB", save_original_format=True)
    tokenizer_with_begin(VICUNA).save_pretrained(folder)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    crop = {"size": {"shortest_edge": 40}, "crop_size": SQUARE, "do_center_crop": True}
    _preprocessor(folder, "CLIPImageProcessor", processor, **crop)
    return folder


def save_llava_siglip(folder: Path, **changes: Any) -> Path:
    """SigLIP's last layer, not normalised, and Qwen2; the chat template takes texts."""
    changes = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
        **changes,
    }
    config = _config(LlavaConfig, SIGLIP, "qwen2", **changes)
    randomised(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 8,
        "vision_feature_select_strategy": "full",
    }
    _preprocessor(folder, "SiglipImageProcessor", processor, size=SQUARE)
    return folder


def save_llava_next(folder: Path, **changes: Any) -> Path:
    """CLIP's second layer of three and Mistral; grids of up to four tiles."""
    changes = {"vision_feature_layer": 2, "image_grid_pinpoints": GRIDS, **changes}
    config = _config(LlavaNextConfig, CLIP, "mistral", **changes)
    randomised(LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer_with_begin(VICUNA).save_pretrained(folder)
    processor = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    _preprocessor(
        folder,
        "LlavaNextImageProcessor",
        processor,
        size={"shortest_edge": 32},
        crop_size=SQUARE,
        do_center_crop=True,
        do_pad=True,
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return folder


def save_llava_onevision(folder: Path, **changes: Any) -> Path:
    """SigLIP's last layer, Qwen2 with tied embeddings; grids of up to 4 x 4 tiles, 9 unscaled."""
    sides = [32, 64, 96, 128]
    grids = [[high, wide] for high in sides for wide in sides]
    changes = {
        "tie_word_embeddings": True,
        "video_token_index": 301,
        "image_grid_pinpoints": grids,
        **changes,
    }
    config = _config(LlavaOnevisionConfig, SIGLIP, "qwen2", **changes)
    randomised(LlavaOnevisionForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
    }
    _preprocessor(
        folder,
        "LlavaOnevisionImageProcessor",
        processor,
        size=SQUARE,
        do_pad=True,
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return folder


def save_blip2(folder: Path, **changes: Any) -> Path:
    """Three layers of ViT, two of Q-Former, OPT; the tokenizer has no chat template."""
    tower = {name: value for name, value in CLIP.items() if name not in ("model_type",)}
    text = OPTConfig(
        vocab_size=320,
        hidden_size=20,
        word_embed_proj_dim=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    bert = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    values = {"num_query_tokens": 3, "image_token_index": 300, "text_config": text, **changes}
    config = Blip2Config(vision_config=tower, qformer_config=bert, **values)
    randomised(Blip2ForConditionalGeneration(config), scale=0.5).save_pretrained(folder)
    tokenizer_with_begin().save_pretrained(folder)
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": 3}
    _preprocessor(folder, "BlipImageProcessor", processor, size=SQUARE)
    return folder


SAVERS: dict[str, Callable[..., Path]] = {
    "llava": save_llava,
    "llava_siglip": save_llava_siglip,
    "llava_next": save_llava_next,
    "llava_onevision": save_llava_onevision,
}
"""Of the LLaVA classes, by name."""
