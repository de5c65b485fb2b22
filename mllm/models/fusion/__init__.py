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

FUSIONS: dict[str, type[Fusion]] = {
    "cross_attention": CrossAttention,
    "deepstack": DeepStack,
    "in_sequence": InSequence,
}

DEFAULT = "in_sequence"


def fusion_class(spec: Mapping[str, Any]) -> type[Fusion]:
    """Return the class of a fusion's spec; empty is `in_sequence`.

    Raises:
        ValueError: no such fusion.
    """
    return choose(FUSIONS, spec.get("name", DEFAULT), "fusion")


def check_tiles(spec: Mapping[str, Any], images: Mapping[str, Any]) -> None:
    """Refuse to cut images into tiles for a fusion that takes them whole.

    Raises:
        ValueError: naming both.
    """
    if images and not fusion_class(spec).TILES:
        raise ValueError(
            f"fusion {spec['name']} takes images whole; leave images (tiling {images['tiling']}) "
            f"out, or use fusion {DEFAULT}"
        )


__all__ = ["DEFAULT", "FUSIONS", "Fused", "Fusion", "Hook", "Visual"]
__all__ += ["check_tiles", "fusion_class", "hooked"]
