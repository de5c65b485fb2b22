"""Visual tokens take the places of image tokens (LLaVA, arXiv 2304.08485, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import Cache

from mllm.models.fusion.base import Fused, Fusion, Visual, check_visual, untouched


class InSequence(Fusion):
    """One image token in the text for every visual token; the layers see no difference."""

    def fuse(
        self,
        text: Tensor,
        slots: Tensor,
        visual: Visual | None,
        bounds: Sequence[int] | None,
        cache: Cache | None,
    ) -> Fused:
        """Put visual tokens into the places of image tokens."""
        check_visual(slots, visual)
        if visual is None:
            return Fused(text)
        if not visual.images:
            return Fused(untouched(text, visual))
        return Fused(text.masked_scatter(slots[..., None], visual.tokens.to(text.dtype)))
