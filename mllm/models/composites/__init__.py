"""Whole models of transformers to begin from, by the `model_type` of their config.json."""

from __future__ import annotations

from mllm.models.composites.base import Composite
from mllm.models.composites.blip2 import BLIP2
from mllm.models.composites.llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION

COMPOSITES: dict[str, Composite] = {
    "blip-2": BLIP2,
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
}

__all__ = ["COMPOSITES", "Composite"]
