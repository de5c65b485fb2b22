"""transformers' own processors where torchvision is not installed.

The processors of InternVL and SmolVLM want a video processor, which needs torchvision. Here the
same classes load without one: what they make of texts and images is their own code. This file
imports nothing of ours: a process that cannot import us uses it too.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor


class _InternVl(InternVLProcessor):
    """Without videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class _Qwen2Vl(Qwen2VLProcessor):
    """Without videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class _Qwen2_5Vl(Qwen2_5_VLProcessor):
    """Without videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class _Qwen3Vl(Qwen3VLProcessor):
    """Without videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class _SmolVlm(SmolVLMProcessor):
    """Without videos, which alone need numbers as words."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_seq_len: int = 169,
        chat_template: str | None = None,
    ) -> None:
        processing_smolvlm.num2words = processing_smolvlm.num2words or str
        super().__init__(image_processor, tokenizer, None, image_seq_len, chat_template)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return super(SmolVLMProcessor, self).apply_chat_template(*args, **kwargs)


def usable(kind: Any) -> bool:
    """Whether a class can be used here; transformers 5.17 wants torchvision for more of them."""
    try:
        return callable(kind.from_pretrained)
    except ImportError:
        return False


def own_processor(folder: str, name: str) -> Any:
    """Load the processor of a folder."""
    kinds = {
        "internvl": _InternVl,
        "qwen2_5_vl": _Qwen2_5Vl,
        "qwen2_vl": _Qwen2Vl,
        "qwen3_vl": _Qwen3Vl,
        "qwen3_vl_moe": _Qwen3Vl,
        "smolvlm": _SmolVlm,
    }
    return kinds.get(name, AutoProcessor).from_pretrained(folder)
