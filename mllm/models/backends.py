"""The ways in which attention inside each document of a pack is computed.

A soft cap or sinks are not in any fused kernel that is used here: such a layer computes its scores
outright, one document at a time, on every device. That takes H x L x L numbers for a document of L
tokens; the fused ones do not.

Shapes: B batch (1 in a pack), H heads, K key-value heads, T tokens of the pack, L of a document,
S keys, D head width, E width of values (D in most families).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mllm.models.blocks import Blocks

Backend = Literal["flash_attn", "varlen_attn", "sdpa"]


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


def attend_in_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
    dropout: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Attend inside each document of a pack, in the best way that this device has.

    Args:
        query: [1, H, T, D]; key: [1, K, T, D]; value: [1, K, T, E].
        cu_seqlens: int32 [n+1]; bounds: the same as plain numbers.
        window: how many tokens, itself included, a token sees. None: all before it.
        blocks: images that see themselves in both directions. Documents that have some get a mask
            of L x L; the others are computed as without.

    Returns:
        [1, T, H, E].
    """
    if blocks is not None:
        return _attend_with_images(
            query, key, value, cu_seqlens, bounds, scaling, window, dropout, softcap, sinks, blocks
        )
    if softcap is not None or sinks is not None:
        return attend_exactly_in_documents(
            query, key, value, bounds, scaling, window, dropout, softcap, sinks
        )
    backend = chosen_backend(query.device, query.dtype)
    missing = 0 if backend == "sdpa" else query.shape[-1] - value.shape[-1]
    if missing:  # fused kernels want one width; zeros weigh nothing and are cut off again
        value = functional.pad(value, (0, missing))
    output = BACKENDS[backend](query, key, value, cu_seqlens, bounds, scaling, window, dropout)
    return output[..., :-missing] if missing else output


def _attend_with_images(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
    blocks: Blocks,
) -> Tensor:
    """Documents with images one by one, neighbours without as one smaller pack."""
    options = (scaling, window, dropout, softcap, sinks)
    outputs = []
    for first, last in _runs(blocks.documents):
        low, high = bounds[first], bounds[last]
        q, k, v = (tensor[:, :, low:high] for tensor in (query, key, value))
        if not blocks.documents[first]:
            smaller = cu_seqlens[first : last + 1] - cu_seqlens[first]
            inside = [bound - low for bound in bounds[first : last + 1]]
            outputs.append(attend_in_documents(q, k, v, smaller, inside, *options))
            continue
        seen = _past(high - low, window, query.device) | blocks.later(low, high)
        if softcap is not None or sinks is not None:
            outputs.append(attend_exactly(q, k, v, seen, scaling, softcap, sinks, dropout))
            continue
        outputs.append(_attend_to(q, k, v, seen, scaling, dropout).transpose(1, 2))
    return torch.cat(outputs, dim=1).contiguous()


def _runs(shown: Sequence[bool]) -> list[tuple[int, int]]:
    """Return (first, last + 1) of documents: each that has images, neighbours that have none."""
    runs: list[tuple[int, int]] = []
    for number, has in enumerate(shown):
        if runs and not has and not shown[runs[-1][0]]:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def attend_exactly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attend with a soft cap or sinks, as transformers' eager attention of such families does.

    Args:
        query: [B, H, L, D]; key: [B, K, S, D]; value: [B, K, S, E].
        seen: what may be seen, bool, broadcast to [B, H, L, S]. None: the past.
        softcap: scores become softcap * tanh(score / softcap) before the mask (Gemma 2,
            arXiv 2408.00118).
        sinks: [H], a score per head that takes its share of the softmax and gives nothing
            (gpt-oss, arXiv 2508.10925).

    Returns:
        [B, L, H, E].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is None and query.shape[2] > 1:
        seen = _past(query.shape[2], None, query.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    shares = functional.dropout(shares[..., : key.shape[2]], dropout, training=dropout > 0)
    return (shares @ value).transpose(1, 2).contiguous()


def attend_exactly_in_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`attend_exactly` in each document of a pack: [1, H, T, D] to [1, T, H, E]."""
    outputs = []
    for q, k, v in _documents(query, key, value, bounds):
        seen = _past(q.shape[2], window, q.device)
        outputs.append(attend_exactly(q, k, v, seen, scaling, softcap, sinks, dropout))
    return torch.cat(outputs, dim=1)


def _documents(
    query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int]
) -> Iterator[tuple[Tensor, ...]]:
    """Queries, keys and values of each document: [1, H, L, D], [1, K, L, D], [1, K, L, E]."""
    lengths = [high - low for low, high in itertools.pairwise(bounds)]
    # split, not slices: its backward is one concatenation, not a zero-filled pack per document
    return zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)


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
    outputs = []
    for q, k, v in _documents(query, key, value, bounds):
        length = q.shape[2]
        seen = _past(length, window, q.device) if window and length > window else None
        outputs.append(_attend_to(q, k, v, seen, scaling, dropout))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _attend_to(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Attend to what is seen, bool [L, S], or to the past: [1, H, L, D] to [1, H, L, E]."""
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        dropout_p=dropout,
        is_causal=seen is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _past(length: int, window: int | None, device: torch.device) -> Tensor:
    """What a token sees, bool [L, L]: itself and what stands before it, as far as the window."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return ones.triu(1 - window) if window else ones


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


BACKENDS: dict[Backend, Callable[..., Tensor]] = {
    "flash_attn": _flash,
    "varlen_attn": _varlen,
    "sdpa": _sdpa,
}
