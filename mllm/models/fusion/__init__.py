"""How visual tokens reach the language model, by name.

Reading order: base.py (what a fusion is), hooks.py (where it reaches into the language model), then
the fusions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.models.errors import choose
from mllm.models.fusion.base import Fused, Fusion, Visual
from mllm.models.fusion.cross_attention import CrossAttention
from mllm.models.fusion.deepstack import DeepStack
from mllm.models.fusion.hooks import Hook, hooked
from mllm.models.fusion.in_sequence import InSequence
from mllm.models.tiles import special_tokens
from mllm.parts.fusions import DEFAULT

FUSIONS: dict[str, type[Fusion]] = {
    "cross_attention": CrossAttention,
    "deepstack": DeepStack,
    "in_sequence": InSequence,
}


def fusion_class(spec: Mapping[str, Any]) -> type[Fusion]:
    """Return the class of a fusion's spec; empty is `in_sequence`.

    Raises:
        ValueError: no such fusion.
    """
    return choose(FUSIONS, spec.get("name", DEFAULT), "fusion")


def check_images(spec: Mapping[str, Any], images: Mapping[str, Any]) -> None:
    """Refuse an `images:` section that a fusion cannot follow.

    Raises:
        ValueError: naming both.
    """
    if images.get("regions") == "feature" and not fusion_class(spec).PARTS:
        raise ValueError(
            f"fusion {spec['name']} has one token for an image and none for a region of it; write "
            f"images.regions as decimals or thousandths, or use fusion {DEFAULT}"
        )


def needed_tokens(spec: Mapping[str, Any], images: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the special tokens that an `images:` section needs with a fusion."""
    return special_tokens(images) if fusion_class(spec).PARTS else ()


__all__ = ["DEFAULT", "FUSIONS", "Fused", "Fusion", "Hook", "Visual"]
__all__ += ["check_images", "fusion_class", "hooked", "needed_tokens"]
