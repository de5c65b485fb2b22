"""Attention that stays inside each document of a pack.

Registered with transformers as the attention implementation "packed". A packed call hands
`cu_seqlens` down the language model's keyword arguments to every layer; each document then attends
to itself only. Without `cu_seqlens` the same implementation is ordinary SDPA with the ordinary mask
(generation, padded batches). transformers' own detection of packs from position ids is not used: it
is skipped when a cache exists, and `use_cache` defaults to true.

Shapes: B batch (1 in a pack), H heads, K key-value heads, T tokens of the pack, D head width.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed"
Backend = Literal["flash_attn", "varlen_attn", "sdpa"]

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_REFUSED_SETTINGS = {
    "attn_logit_softcapping": "soft caps on attention",
    "final_logit_softcapping": "a soft cap on the logits",
    "logits_scaling": "scaled logits",
    "logit_scale": "scaled logits",
}


@dataclass(slots=True)
class _PackedCall:
    """What runs now; layers count themselves, so that none can be passed over in silence."""

    attended: int = 0


_running: ContextVar[_PackedCall | None] = ContextVar("packed_call", default=None)


@contextmanager
def packed_call(model: nn.Module, layers: int) -> Iterator[None]:
    """Mark that a pack is inside the language model: masks are None, every layer must isolate.

    Raises:
        ValueError: fewer than `layers` layers isolated the documents.
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


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return no mask inside a packed call, and what SDPA needs elsewhere."""
    return None if _running.get() is not None else sdpa_mask(*args, **kwargs)


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend: inside each document when `cu_seqlens` is given, ordinarily otherwise.

    Args:
        query: [B, H, T, D]; key, value: [B, K, T, D].
        cu_seqlens: int32 [n+1], where documents begin and the last one ends.
        bounds: the same as plain numbers.
        sliding_window: how many tokens, itself included, a token sees.

    Returns:
        [B, T, H, D] and None (no attention weights).

    Raises:
        ValueError: a pack reached a layer without its bounds, or asks for what is not supported.
    """
    call = _running.get()
    if cu_seqlens is None:
        if call is not None:
            raise ValueError(
                f"{type(module).__name__} does not receive cu_seqlens: this language model drops "
                "keyword arguments on the way to its attention and cannot be trained packed"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    for name, what in (("softcap", "soft caps"), ("s_aux", "sinks"), ("position_bias", "biases")):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__}: attention {what} are not supported")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a pack is one row without a cache; got {query.shape[0]} rows, {query.shape[2]} new "
            f"tokens and {key.shape[2]} in all"
        )
    if call is not None:
        call.attended += 1
    bounds = bounds or document_bounds(cu_seqlens, query.shape[2])
    attend = _BACKENDS[chosen_backend(query.device, query.dtype)]
    return attend(query, key, value, cu_seqlens, bounds, scaling, sliding_window, dropout), None


def available_backends() -> list[Backend]:
    """Name the back ends that can run on some device of this machine, best first."""
    backends: list[Backend] = []
    if torch.cuda.is_available() and _flash_attn() is not None:
        backends.append("flash_attn")
    if torch.cuda.is_available() and _varlen_attn() is not None:
        backends.append("varlen_attn")
    return [*backends, "sdpa"]


def chosen_backend(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Backend:
    """Name the back end that attention on `device` in `dtype` uses."""
    if torch.device(device).type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    return available_backends()[0]


def check_supported(config: PreTrainedConfig, model: nn.Module | None = None) -> None:
    """Refuse language models whose attention or logits the packed path would get wrong.

    Raises:
        ValueError: naming the model and the reason.
    """
    name = type(model).__name__ if model is not None else config.model_type
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise ValueError(f"{name}: layers of type {', '.join(sorted(strange))} are not supported")
    for setting, what in _REFUSED_SETTINGS.items():
        if getattr(config, setting, None) not in (None, 1, 1.0):
            raise ValueError(f"{name} has {what} ({setting}), which is not supported")
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{name} is not causal; a causal language model is needed")
    if model is None:
        return
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not use transformers' AttentionInterface, so cannot pack")
    if any(parameter.rsplit(".", 1)[-1] == "sinks" for parameter, _ in model.named_parameters()):
        raise ValueError(f"{name} has attention sinks, which are not supported")


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    lengths = [high - low for low, high in itertools.pairwise(bounds)]
    # split, not slices: its backward is one concatenation, not a zero-filled pack per document
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for (q, k, v), length in zip(parts, lengths, strict=True):
        mask = _window_mask(length, window, q.device) if window and length > window else None
        outputs.append(
            functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    attend = _varlen_attn()
    assert attend is not None
    if dropout:
        raise ValueError("torch's varlen_attn has no attention dropout; set attention_dropout to 0")
    longest = max(high - low for low, high in itertools.pairwise(bounds))
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    return attend(*rows, cu_seqlens, longest, scaling, window)[None]


@cache
def _varlen_attn() -> Callable[..., Tensor] | None:
    """Adapt torch's function; its signature changed (is_causal became window_size in 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = set(inspect.signature(varlen_attn).parameters)
    windowed, grouped = "window_size" in names, "enable_gqa" in names

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        options: dict[str, Any] = {}
        if windowed:
            options["window_size"] = (window - 1 if window else -1, 0)
        elif window and longest > window:
            raise ValueError("this torch's varlen_attn has no sliding window; use torch >= 2.13")
        else:
            options["is_causal"] = True
        if scaling is not None:
            if "scale" in names:
                options["scale"] = scaling
            else:
                query = query * (scaling * query.shape[-1] ** 0.5)
        if query.shape[1] != key.shape[1]:
            if grouped:
                options["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key = key.repeat_interleave(repeats, dim=1)
                value = value.repeat_interleave(repeats, dim=1)
        output: Any = varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options
        )
        assert isinstance(output, Tensor)
        return output

    return attend


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    attend = _flash_attn()
    assert attend is not None
    longest = max(high - low for low, high in itertools.pairwise(bounds))
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    output: Tensor = attend(
        *rows,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
    )
    return output[None]


@cache
def _flash_attn() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    attend: Callable[..., Tensor] = flash_attn_varlen_func
    return attend


_BACKENDS: dict[Backend, Callable[..., Tensor]] = {
    "flash_attn": _flash,
    "varlen_attn": _varlen,
    "sdpa": _sdpa,
}

AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)
