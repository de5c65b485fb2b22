"""Whole models of transformers to begin from, by the `model_type` of their config.json."""

from __future__ import annotations

from mllm.models.composites.base import Composite
from mllm.models.composites.blip2 import BLIP2
from mllm.models.composites.gemma3 import GEMMA3
from mllm.models.composites.idefics3 import IDEFICS3, SMOLVLM
from mllm.models.composites.internvl import INTERNVL
from mllm.models.composites.llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION
from mllm.models.composites.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL

COMPOSITES: dict[str, Composite] = {
    "blip-2": BLIP2,
    "gemma3": GEMMA3,
    "idefics3": IDEFICS3,
    "internvl": INTERNVL,
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen2_vl": QWEN2_VL,
    "qwen3_vl": QWEN3_VL,
    "smolvlm": SMOLVLM,
}

__all__ = ["COMPOSITES", "Composite"]
