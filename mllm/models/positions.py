"""Positions in three directions, for language models that were trained with them (M-RoPE).

Wang et al. 2024 (arXiv 2409.12191, section 2.1). A token of text has its place as time, row and
column alike. The tokens of a view share the place where the view begins as their time and add their
row and column to it; text goes on after the larger side of the view. So a view of r x c tokens
takes max(r, c) places, not r c.

Shapes: B rows, T tokens of a row, K visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.models.geometry import Size

_FAMILIES = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""Have them also where the configuration leaves `mrope_section` to the class."""


def is_spatial(config: Any) -> bool:
    """Whether a language model's configuration divides its rotary widths among directions."""
    rope = getattr(config, "rope_parameters", None) or {}
    return config.model_type in _FAMILIES or rope.get("mrope_section") is not None


def placed(
    slots: Tensor,
    grids: Sequence[Size],
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    bounds: tuple[int, ...] | None = None,
    seen: int = 0,
) -> Tensor:
    """Return positions [3, B, T] from what a caller knows.

    Args:
        slots, grids, bounds: as `spatial_positions`; without grids visual tokens count as text.
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
    if positions is None and mask is not None:
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    elif positions is None:
        positions = torch.arange(slots.shape[1], device=slots.device)
    positions = positions.expand(slots.shape)
    return (
        spatial_positions(positions, slots, grids, bounds) if grids else positions.expand(3, -1, -1)
    )


def spatial_positions(
    positions: Tensor,
    slots: Tensor,
    grids: Sequence[Size],
    bounds: tuple[int, ...] | None = None,
) -> Tensor:
    """Return positions [3, B, T] (time, row, column).

    Args:
        positions: [B, T], plain ones: how many tokens of its document stand before a token.
        slots: bool [B, T], where visual tokens stand.
        grids: (rows, columns) of the visual tokens of each view, in the order of rows and slots.
        bounds: where documents of a pack begin, and T. None: every row is one document.
    """
    ahead, down, across = (one.to(slots.device, non_blocking=True) for one in _offsets(grids))
    blank = torch.zeros_like(slots, dtype=torch.int64)
    more = blank.masked_scatter(slots, ahead)
    shift = more.cumsum(dim=1) - more
    if bounds is not None:
        first = torch.tensor(bounds[:-1]).repeat_interleave(torch.tensor(bounds).diff())
        shift = shift - shift[:, first.to(shift.device, non_blocking=True)]
    time = positions + shift
    return torch.stack(
        [
            time,
            time + blank.masked_scatter(slots, down),
            time + blank.masked_scatter(slots, across),
        ]
    )


def _offsets(grids: Sequence[Size]) -> tuple[Tensor, Tensor, Tensor]:
    """For each visual token [K]: how many places more than one it takes, its row, its column.

    The last token of a view takes all the places of the view, the others none.
    """
    ahead, down, across = [], [], []
    for rows, columns in grids:
        places = torch.full((rows * columns,), -1)
        places[-1] += max(rows, columns)
        ahead.append(places)
        down.append(torch.arange(rows).repeat_interleave(columns))
        across.append(torch.arange(columns).repeat(rows))
    empty = torch.zeros(0, dtype=torch.int64)
    return (torch.cat([empty, *ahead]), torch.cat([empty, *down]), torch.cat([empty, *across]))
