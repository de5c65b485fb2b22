"""What a pack costs, from the model's shape: how the plan knows which packs cost alike.

The unit is one multiply and add. A matrix of W weights takes W of them per token in the forward
pass, W more where gradients pass through it and W more where it learns. Attention inside a document
of L tokens takes layers x width x L^2 in the forward pass (two products, half of each masked) and
twice that in the backward pass. An image takes what the encoder's forward pass takes, three times
where the encoder learns; torch counts it on tensors without data. The connector is left out: it is
small beside either. Layers of a fusion count as if every token saw one image of common size, all
its tiles included. Where a machine's own speeds matter more, a recipe gives other numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from data_packing.balance import PackCost
from mllm.models.encoders import VisionEncoder
from mllm.recipe import Recipe
from mllm.training.quantised import numel, unpacked

FORWARD, THROUGH, LEARNS = 1, 1, 1
"""Multiplications of a weight: forward, for the gradient of its input, for its own gradient."""


COMMON = (480, 640)
"""(height, width) of the image that every token sees, as far as a fusion's cost goes."""


def pack_cost(recipe: Recipe, model: Any, processor: Any) -> PackCost | None:
    """The cost that the recipe gives, or that of the model as it is trained; None for `false`.

    Args:
        model: a MultimodalModel with `requires_grad` set, adapters put in.
        processor: its own, which knows what an image becomes.
    """
    balance = recipe.data.packing.balance
    if balance.off:
        return None
    given = balance.model_dump(exclude={"off"}, exclude_none=True)
    if given:
        return PackCost(**given)
    tokens = token_cost(model.language_model)
    pairs = pair_cost(model.language_model.config)
    patches = patch_cost(model.encoder)
    more_tokens, more_patches = fusion_cost(model, processor)
    tokens, patches = tokens + more_tokens, patches + more_patches
    return PackCost(1.0, _rounded(pairs / tokens), _rounded(patches / tokens))


def token_cost(language_model: Any) -> float:
    """Multiply-adds of one token, attention left out."""
    embedding = language_model.get_input_embeddings().weight
    head = language_model.get_output_embeddings().weight
    total = 0.0
    for weight in language_model.parameters():
        if weight.ndim > 1 and (weight is not embedding or embedding is head):
            total += _passes([weight])
    return total


def pair_cost(config: Any) -> float:
    """Multiply-adds of attention per squared token of a document; attention has no weights."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return float((FORWARD + 2 * THROUGH) * config.num_hidden_layers * width)


def patch_cost(encoder: VisionEncoder) -> float:
    """Multiply-adds of one patch of a view."""
    pixels, sizes = encoder.blank("meta")
    with unpacked(encoder), torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers())
        }
        functional_call(encoder, empty, (pixels, sizes))
    passes = FORWARD + (THROUGH + LEARNS if encoder.trains else 0)
    return float(passes * counter.get_total_flops() / 2 / encoder.patches(*sizes[0].tolist()))


def fusion_cost(model: Any, processor: Any) -> tuple[float, float]:
    """What a fusion's own weights and attention add: to a token, and to a patch of a view."""
    work, layout = model.fusion.work(), processor.layout(*COMMON)
    token = _passes(work.token) + (FORWARD + 2 * THROUGH) * work.pair * layout.visual
    return token, _passes(work.visual) * layout.visual / layout.patches


def _passes(weights: Iterable[nn.Parameter]) -> float:
    """Multiply-adds of all these weights, once each."""
    always = FORWARD + THROUGH
    return float(sum((always + LEARNS * w.requires_grad) * numel(w) for w in weights))


def _rounded(value: float) -> float:
    """Three digits: as exact as it can be, and the same on every machine."""
    return float(f"{value:.3g}")
