"""Masks for images whose tokens see each other in both directions.

See `standalone`, with which this becomes one file. B rows, T tokens of a row, S keys.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import create_masks_for_generate

from mllm.models.blocks import what_attention_is_told

_SERVED = "vllm"
"""The attention of vLLM, which opens its masks itself: `MllmConfig.is_mm_prefix_lm` tells it."""


def opened_masks(
    config: Any, input_ids: Tensor | None, embeds: Tensor, mask: Any, cache: Any
) -> Any:
    """Return the attention mask, or masks, of the language model, opened inside images.

    Args:
        config: of the model.
        input_ids: [B, T]. embeds: [B, T, D], what they were made into.
        mask: [B, S], 1 where a row has a token.
        cache: what the call adds to.
    """
    text = config.text_config
    if text._attn_implementation == _SERVED:
        return mask
    blocks = what_attention_is_told(config, input_ids, None, cache).get("blocks")
    if blocks is None:
        return mask
    seen = 0 if cache is None else cache.get_seq_length()
    numbers_BS = functional.pad(blocks.numbers, (seen, 0))
    last = numbers_BS.shape[1] - 1

    def later(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a key is later in the image that the query is in."""
        own = numbers_BS[row, query.clamp(max=last)]
        other = numbers_BS[row, key.clamp(max=last)]
        return (key > query) & (own > 0) & (own == other)

    return create_masks_for_generate(text, embeds, mask, cache, or_mask_function=later)
