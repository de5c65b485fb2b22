"""Attention that stays inside each document of a pack.

Registered with transformers as the attention implementation "packed". A packed call hands
`cu_seqlens` down the language model's keyword arguments to every layer; each document then attends
to itself only. Without `cu_seqlens` the same implementation is ordinary SDPA with the ordinary mask
(generation, padded batches). transformers' own detection of packs from position ids is not used: it
is skipped when a cache exists, and `use_cache` defaults to true.

Shapes: B batch (1 in a pack), H heads, K key-value heads, T tokens of the pack, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mllm.models.backends import attend_exactly, attend_in_documents
from mllm.models.blocks import Blocks

NAME = "packed"


@dataclass(slots=True)
class _PackedCall:
    """What runs now; layers count themselves, so that none can be passed over in silence.

    Attributes:
        attended: layers that isolated the documents.
        masks: windows of the masks that the model asked for; its layers must honour them.
        windows: windows that layers did honour.
    """

    attended: int = 0
    masks: set[int] = field(default_factory=set)
    windows: set[int] = field(default_factory=set)


_running: ContextVar[_PackedCall | None] = ContextVar("packed_call", default=None)


@contextmanager
def packed_call(model: nn.Module, layers: int) -> Iterator[None]:
    """Mark that a pack is inside the language model: masks are None, every layer must isolate.

    Raises:
        ValueError: fewer than `layers` layers isolated the documents, or the model narrows what a
            token sees in its mask alone, which a pack does not use.
    """
    call = _PackedCall()
    token = _running.set(call)
    try:
        yield
    finally:
        _running.reset(token)
    if call.attended < layers:
        raise ValueError(
            f"{type(model).__name__} isolated the documents of a pack in {call.attended} of its "
            f"{layers} layers: it does not hand cu_seqlens to its attention, or mixes tokens in "
            "another way; this language model cannot be trained packed"
        )
    if unknown := call.masks - call.windows:
        raise ValueError(
            f"{type(model).__name__} asks for a mask with a window of {min(unknown)} tokens, but "
            "no layer says that it has one; this language model cannot be trained packed"
        )


def document_bounds(cu_seqlens: Tensor, tokens: int) -> tuple[int, ...]:
    """Return `cu_seqlens` [n+1] as plain numbers, once per pack (it waits for the device).

    Raises:
        ValueError: they do not rise from 0 to `tokens`.
    """
    bounds = tuple(cu_seqlens.tolist())
    rising = all(low < high for low, high in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or not rising:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {tokens} tokens of the pack, got {list(bounds)}"
        )
    return bounds


def packed_mask(**kwargs: Any) -> Tensor | None:
    """Return no mask inside a packed call, and what SDPA needs elsewhere.

    Raises:
        ValueError: inside a packed call, a mask that is more than the past and a sliding window.
    """
    call = _running.get()
    if call is None:
        return sdpa_mask(**kwargs)
    config, window = kwargs["config"], kwargs.get("local_size")
    if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs:
        raise ValueError(
            f"{config.model_type} does not attend to the past alone but has a mask of its own; "
            "it cannot be trained packed"
        )
    types = getattr(config, "layer_types", None) or ("sliding_attention",)
    if window is not None and "sliding_attention" in types:
        call.masks.add(window)
    return None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seqlens: Tensor | None = None,
    bounds: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    blocks: Blocks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend: inside each document when `cu_seqlens` is given, ordinarily otherwise.

    Args:
        query: [B, H, T, D]; key: [B, K, T, D]; value: [B, K, T, E].
        cu_seqlens: int32 [n+1], where documents begin and the last one ends.
        bounds: the same as plain numbers.
        sliding_window: how many tokens, itself included, a token sees.
        softcap: of the scores, s_aux: [H], sinks; see `backends.attend_exactly`.
        blocks: images that see themselves in both directions.

    Returns:
        [B, T, H, E] and None (no attention weights).

    Raises:
        ValueError: a pack reached a layer without its bounds, or asks for what is not supported.
    """
    if cu_seqlens is None:
        if _running.get() is not None:
            raise ValueError(
                f"{type(module).__name__} does not receive cu_seqlens: this language model drops "
                "keyword arguments on the way to its attention and cannot be trained packed"
            )
        if blocks is not None:
            attention_mask = blocks.opened(attention_mask, key.shape[2])
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        return attend_exactly(
            query, key, value, attention_mask, scaling, softcap, s_aux, dropout
        ), None
    _check_packed(module, query, key, attention_mask, kwargs)
    if (call := _running.get()) is not None:
        call.attended += 1
        if sliding_window is not None:
            call.windows.add(sliding_window)
    bounds = bounds or document_bounds(cu_seqlens, query.shape[2])
    options = (scaling, sliding_window, dropout, softcap, s_aux, blocks)
    return attend_in_documents(query, key, value, cu_seqlens, bounds, *options), None


def _check_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> None:
    """Refuse a layer of a pack that would be computed wrongly.

    Raises:
        ValueError: naming the layer's class and the reason.
    """
    name = type(module).__name__
    if options.get("position_bias") is not None:
        raise ValueError(f"{name}: attention biases are not supported")
    if attention_mask is not None:
        raise ValueError(
            f"{name} makes a mask of its own, which a pack does not use; it cannot be "
            "trained packed"
        )
    if options.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(f"{name} is not causal; a causal language model is needed")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a pack is one row without a cache; got {query.shape[0]} rows, {query.shape[2]} new "
            f"tokens and {key.shape[2]} in all"
        )


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)
