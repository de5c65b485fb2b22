"""Whole models of transformers to begin from, by the `model_type` of their config.json."""

from __future__ import annotations

from mllm.models.composites.base import Composite
from mllm.models.composites.idefics3 import IDEFICS3, SMOLVLM
from mllm.models.composites.internvl import INTERNVL
from mllm.models.composites.qwen_vl import QWEN2_5_VL, QWEN2_VL

COMPOSITES: dict[str, Composite] = {
    "idefics3": IDEFICS3,
    "internvl": INTERNVL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen2_vl": QWEN2_VL,
    "smolvlm": SMOLVLM,
}

__all__ = ["COMPOSITES", "Composite"]
