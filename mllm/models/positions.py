"""Positions in three directions, for language models that were trained with them (M-RoPE).

Wang et al. 2024 (arXiv 2409.12191, section 2.1). A token of text has its place as time, row and
column alike. The tokens of a view share the place where the view begins as their time and add their
row and column to it; text goes on after the larger side of the view. So a view of r x c tokens
takes max(r, c) places, not r c.

Visual tokens that stand in the text in another way than view by view (a region's mean, a map put
together of tiles) have places like text.

Shapes: B rows, T tokens of a row, M visual tokens that all views make, K image tokens in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mllm.models.geometry import Size

_FAMILIES = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")
"""Have them also where the configuration leaves `mrope_section` to the class."""


def is_spatial(config: Any) -> bool:
    """Whether a language model's configuration divides its rotary widths among directions."""
    rope = getattr(config, "rope_parameters", None) or {}
    return config.model_type in _FAMILIES or rope.get("mrope_section") is not None


def check_directions(config: Any) -> None:
    """Refuse parts of the rotary widths that are not the three of a head.

    Raises:
        ValueError: naming them and what they must come to.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = rope.get("mrope_section")
    if config.model_type not in _FAMILIES or parts is None:
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    whole = isinstance(parts, list | tuple) and all(type(part) is int for part in parts)
    if not whole or len(parts) != 3 or sum(parts) != width // 2:
        raise ValueError(
            f"config.json has mrope_section {parts}, which must be three numbers that come to "
            f"{width // 2}, half the width of a head; copy the checkpoint's own"
        )


def named(order: Tensor | None, bags: Tensor | None) -> list[int] | None:
    """Return which of the M visual tokens each of the K image tokens is, -1 where it is none alone.

    Args:
        order, bags: as `Pack`; None or empty: as the views make them, and None is returned.
    """
    if order is None or not len(order):
        return None
    if bags is None or not len(bags):
        return order.tolist()
    first = order.cpu()[bags.cpu().cumsum(0) - bags.cpu()]
    return torch.where(bags.cpu() == 1, first, -1).tolist()


def placed(
    slots: Tensor,
    grids: Sequence[Size],
    tokens: Sequence[int] | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    bounds: tuple[int, ...] | None = None,
    seen: int = 0,
) -> Tensor:
    """Return positions [3, B, T] from what a caller knows.

    Args:
        slots, grids, tokens, bounds: as `spatial_positions`.
        positions: [3, B, T], which stay; or [B, T], plain ones. None: counted from 0 in every row.
        mask: [B, T], 1 where a row has a token; the first of them is counted as 0.
        seen: tokens in a cache.

    Raises:
        ValueError: tokens in a cache and plain positions: the images before are not known.
    """
    if positions is not None and positions.ndim == 3:
        return positions
    if seen:
        raise ValueError(
            "this language model's positions depend on the images before: with a cache give "
            "position_ids [3, B, T]"
        )
    if positions is None:
        positions = plain_positions(slots, mask)
    positions = positions.expand(slots.shape)
    if not grids:
        return positions.expand(3, -1, -1)
    return spatial_positions(positions, slots, grids, tokens, bounds)


def plain_positions(slots: Tensor, mask: Tensor | None = None, seen: int = 0) -> Tensor:
    """Return how many tokens of its row stand before each token, [B, T].

    Args:
        slots: [B, T], for the shape.
        mask: [B, T], or [B, S] with what is in a cache; 1 where a row has a token.
        seen: tokens in a cache.
    """
    if mask is not None:
        counted = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return counted[:, -slots.shape[1] :]
    return torch.arange(seen, seen + slots.shape[1], device=slots.device).expand(slots.shape)


def spatial_positions(
    positions: Tensor,
    slots: Tensor,
    grids: Sequence[Size],
    tokens: Sequence[int] | None = None,
    bounds: tuple[int, ...] | None = None,
) -> Tensor:
    """Return positions [3, B, T] (time, row, column).

    Args:
        positions: [B, T], plain ones: how many tokens of its document stand before a token.
        slots: bool [B, T], where image tokens stand.
        grids: (rows, columns) of the visual tokens of each view, in the order of rows and slots.
        tokens: [K], which visual token each image token is; see `named`.
        bounds: where documents of a pack begin, and T. None: every row is one document.
    """
    more, down, across = (
        torch.zeros_like(slots, dtype=torch.int64).masked_scatter(slots, one.to(slots.device))
        for one in _offsets(grids, tokens)
    )
    shift = more.cumsum(dim=1) - more
    if bounds is not None:
        first = torch.tensor(bounds[:-1]).repeat_interleave(torch.tensor(bounds).diff())
        shift = shift - shift[:, first.to(shift.device)]
    time = positions + shift
    return torch.stack([time, time + down, time + across])


def _offsets(grids: Sequence[Size], tokens: Sequence[int] | None) -> Tensor:
    """For each image token [3, K]: how many places more than one it takes, its row, its column.

    The last token of a view takes all the places of the view, the others none.
    """
    views = [torch.zeros(3, 0, dtype=torch.int64)]
    for rows, columns in grids:
        places = torch.full((rows * columns,), -1)
        places[-1] += max(rows, columns)
        down = torch.arange(rows).repeat_interleave(columns)
        views.append(torch.stack([places, down, torch.arange(columns).repeat(rows)]))
    made = torch.cat(views, dim=1)
    return made if tokens is None else _where_whole(made, [r * c for r, c in grids], tokens)


def _where_whole(made: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Put what is said of visual tokens [3, M] where whole views stand; text elsewhere: [3, K]."""
    spans = {end - count: end for count, end in zip(counts, accumulate(counts), strict=True)}
    standing = torch.zeros(3, len(tokens), dtype=torch.int64)
    at = 0
    while at < len(tokens):
        start = tokens[at]
        size = spans.get(start, start) - start
        if size and list(tokens[at : at + size]) == [*range(start, start + size)]:
            standing[:, at : at + size] = made[:, start : start + size]
        else:
            size = 1
        at += size
    return standing
