"""What an exported folder adds for fusions that reach into the language model's layers.

See `standalone`, with which this becomes one file. B rows, T tokens of a row, D width of token
embeddings; M visual tokens of an image, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mllm.models.fusion.base import Fused, Visual
from mllm.models.fusion.hooks import hooked


def fuse_images(
    model: Any,
    input_ids: Tensor | None,
    images: Sequence[Tensor] | None,
    inputs_embeds: Tensor | None,
    cache: Cache | None,
) -> Fused:
    """Return what the language model starts from, and what of the images reaches its layers.

    Args:
        model: an `MllmModel`.
        input_ids: [B, T], or `inputs_embeds` [B, T, D] instead, of text or of tokens after those
            that are in the cache.
        images: visual tokens [M, E] of every image, of all rows in order.
        cache: of earlier tokens of the rows; images are in its first call only.
    """
    if inputs_embeds is not None:
        nowhere = torch.zeros(
            inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device
        )
        fused: Fused = model.fusion.fuse(inputs_embeds, nowhere, None, None, cache)
        return fused
    assert input_ids is not None
    text = model.get_input_embeddings()(input_ids)
    visual = None
    if images is not None:
        visual = Visual(torch.cat([*images]).to(text.device), tuple(map(len, images)))
    fused = model.fusion.fuse(text, input_ids == model.config.image_token_id, visual, None, cache)
    return fused


def run_fused(language_model: Any, fused: Fused, **kwargs: Any) -> Any:
    """Call the language model; return its output, with what later tokens need in the cache."""
    count = language_model.config.num_hidden_layers
    with hooked(language_model, count, fused.hooks):
        outputs = language_model(inputs_embeds=fused.embeds, **kwargs)
    if fused.keep is not None and outputs.past_key_values is not None:
        fused.keep(outputs.past_key_values)
    return outputs
