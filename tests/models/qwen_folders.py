"""Tiny random Qwen-VL models of transformers, saved as one finds them on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.models.composite_folders import randomize
from tests.models.conftest import make_tokenizer
from tests.models.native_folders import VISION, qwen_processor

KINDS: dict[str, Any] = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor"),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, "Qwen2VLProcessor"),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, "Qwen3VLProcessor"),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, "Qwen3VLProcessor"),
}
TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% set count = namespace(images=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helper.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set count.images = count.images + 1 %}"
    "{% if add_vision_id %}Picture {{ count.images }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen2-VL's: parts, a default system prompt, numbers of images where they are asked for."""


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    return tokenizer


def save_qwen_vl(
    folder: Path, name: str, tied: bool = False, merge: int = 2, **processor: Any
) -> Path:
    """A model of two layers with 320 rows in its embedding, more than the tokenizer has."""
    torch.manual_seed(31)
    config, kind, processor_class = KINDS[name]
    tokenizer = qwen_tokenizer()
    ids = dict(zip(TOKENS, tokenizer.convert_tokens_to_ids(list(TOKENS)), strict=True))
    text = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    if name.startswith("qwen3"):
        text["head_dim"] = 16
    if name == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    whole = config(
        text_config=text,
        vision_config={**VISION[name.removesuffix("_moe")], "spatial_merge_size": merge},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    randomize(kind(whole)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seen = qwen_processor(processor_class=processor_class, merge_size=merge, **processor)
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    return folder
