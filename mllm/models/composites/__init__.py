"""Whole models of transformers to begin from, by the `model_type` of their config.json."""

from __future__ import annotations

from mllm.models.composites.base import Composite
from mllm.models.composites.blip2 import BLIP2
from mllm.models.composites.gemma3 import GEMMA3
from mllm.models.composites.idefics3 import IDEFICS3, SMOLVLM
from mllm.models.composites.internvl import INTERNVL
from mllm.models.composites.llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION
from mllm.models.composites.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE

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
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "smolvlm": SMOLVLM,
}

_INSTRUCT = (
    "its Q-Former reads the question with a vocabulary of its own, which is not supported: begin "
    "from a BLIP-2, or from parts with the connector {name: q_former, text: true}, which reads the "
    "question as the language model does"
)
UNREADABLE: dict[str, str] = {"instructblip": _INSTRUCT, "instructblipvideo": _INSTRUCT}
"""`model_type` of whole models that cannot be read → why, and what to do."""

__all__ = ["COMPOSITES", "UNREADABLE", "Composite"]
