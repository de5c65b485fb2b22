"""Visual tokens in the sequence, and more of them added after early layers.

DeepStack, Meng et al. 2024, arXiv 2406.04334, section 3; as in Qwen3-VL (arXiv 2511.21631, section
2), each of the chosen layers gets a level of its own. The connector makes all levels of a visual
token side by side: the first D numbers stand in the sequence, the next D are added after the first
chosen layer, and so on. N is the number of chosen layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig

from mllm import parts
from mllm.models.fusion.base import Fused, Visual
from mllm.models.fusion.hooks import Hook
from mllm.models.fusion.in_sequence import InSequence


class DeepStack(InSequence):
    """Levels of visual features, added to hidden states where image tokens are."""

    OPTIONS = parts.FUSIONS["deepstack"].options

    def __init__(self, spec: Mapping[str, Any], config: PreTrainedConfig, embedding: int) -> None:
        super().__init__(spec, config, embedding)
        count = config.num_hidden_layers
        self.places = self.chosen_layers(range(min(3, count)), count)
        if embedding != config.hidden_size:
            raise ValueError(
                f"fusion deepstack: {config.model_type} embeds tokens in {embedding} numbers and "
                f"its layers have {config.hidden_size}; use fusion in_sequence"
            )

    @property
    def visual_width(self) -> int:
        """(1 + N) x D."""
        return (1 + len(self.places)) * self.embedding

    def fuse(
        self,
        text: Tensor,
        slots: Tensor,
        visual: Visual | None,
        bounds: Sequence[int] | None,
        cache: Cache | None,
    ) -> Fused:
        """Put the first level into the sequence and hand the others to their layers."""
        if visual is None or not visual.images:
            return super().fuse(text, slots, visual, bounds, cache)
        first, *levels = visual.tokens.to(text.dtype).chunk(1 + len(self.places), dim=-1)
        fused = super().fuse(text, slots, replace(visual, tokens=first), bounds, cache)
        where = slots.flatten().nonzero().flatten()
        hooks = [
            Hook(layer, partial(_add, where, level), after=True)
            for layer, level in zip(self.places, levels, strict=True)
        ]
        return replace(fused, hooks=tuple(hooks))


def _add(where: Tensor, level: Tensor, hidden: Tensor, _: Tensor) -> Tensor:
    """Add rows [K, D] to hidden states [B, T, D] at these places [K] of all rows."""
    flat = hidden.flatten(0, 1)
    added = flat.index_add(0, where.to(flat.device), level.to(flat.device, flat.dtype))
    return added.view_as(hidden)
