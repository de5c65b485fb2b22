"""One run of a language model with two short documents: is it what a pack takes it for?

Looking at a configuration finds what is known by name; running the model finds the rest. It costs
three forward passes over a dozen tokens, once, when a model is assembled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm.models import attention
from mllm.models.families import output_layer

_FIRST, _SECOND = 5, 6
_TOLERANCE = {torch.float32: 1e-3}
_COARSE = 5e-2  # of a 16-bit model, whose rounding differs with the shapes of its matrix products


@torch.no_grad()
def probe(language_model: Any) -> None:
    """Compare packed documents with each other and with the model's own forward.

    Root mean squares are compared with the spread of the logits: what is looked for is of its size.

    Raises:
        ValueError: another document changes a document's logits, or they are not what
            transformers' own forward computes for it alone.
    """
    name = type(language_model).__name__
    rows = language_model.get_input_embeddings().num_embeddings
    ids = torch.arange(1, 2 * _FIRST + _SECOND + 1) * 7919 % rows
    first, other, second = ids.split([_FIRST, _FIRST, _SECOND])
    try:
        packed = _logits(language_model, first, second)
        changed = _logits(language_model, other, second)
        own = language_model(input_ids=second[None], use_cache=False).logits[0].float()
    except (TypeError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{name} cannot run a pack: {error}") from error
    allowed = _TOLERANCE.get(language_model.dtype, _COARSE) * own.std()
    if _rms(packed - changed) > allowed:
        raise ValueError(
            f"{name}: a document's logits change with the document before it in a pack, so this "
            "language model mixes tokens outside attention and cannot be trained packed"
        )
    if _rms(packed - own) > allowed:
        raise ValueError(
            f"{name}: a packed document's logits are not those that {name} computes for it alone, "
            "so its attention, its positions or its logits need more than is supported"
        )


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _logits(language_model: Any, first: Tensor, second: Tensor) -> Tensor:
    """Logits of the second document of a pack, in fp32."""
    ids = torch.cat([first, second])[None]
    bounds = (0, len(first), ids.shape[1])
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    body = language_model.base_model
    with attention.packed_call(body, language_model.config.num_hidden_layers):
        hidden = body(
            inputs_embeds=language_model.get_input_embeddings()(ids),
            position_ids=positions,
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            bounds=bounds,
            use_cache=False,
        ).last_hidden_state
    head = output_layer(language_model.get_output_embeddings(), language_model.config)
    logits: Tensor = head(hidden[0, len(first) :]).float()
    return logits
