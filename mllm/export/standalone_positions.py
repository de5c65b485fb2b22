"""Positions in three directions, as the language model was trained with them.

See `standalone`, with which this becomes one file. B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mllm.export.standalone_images import token_grid
from mllm.models.geometry import Layout, Size
from mllm.models.positions import placed, plain_positions


def view_grids(tower: Any, connector: dict[str, Any], layouts: Sequence[Layout]) -> list[Size]:
    """Return (rows, columns) of the visual tokens of each view."""
    grid = token_grid(connector)
    return [grid(tower.grid(*size)) for layout in layouts for size in layout.sizes]


def standing_tokens(layouts: Sequence[Layout]) -> list[int] | None:
    """Return which visual token each image token is, see `spatial_positions`."""
    if all(layout.order is None for layout in layouts):
        return None
    tokens: list[int] = []
    first = 0
    for layout in layouts:
        order = range(layout.made) if layout.order is None else layout.order.tolist()
        tokens += [place if place < 0 else first + place for place in order]
        first += layout.made
    return tokens


def placed_after(
    slots: Tensor,
    grids: Sequence[Size],
    tokens: Sequence[int] | None,
    positions: Tensor | None,
    mask: Tensor | None,
    cache: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return positions [3, B, T], and [B, 1] how far they are ahead of plain ones after this call.

    A cache keeps the latter, so that a call that adds to it finds where it goes on.

    Args:
        slots, grids, tokens, positions, mask: as `placed`; `mask` with what is in the cache.
    """
    if positions is not None and positions.ndim == 3:
        return positions, None
    seen = 0 if cache is None else cache.get_seq_length()
    if positions is None:
        positions = plain_positions(slots, mask, seen)
    ahead = getattr(cache, "rope_deltas", None) if seen else 0
    if ahead is None:  # the cache is somebody else's
        return placed(slots, grids, tokens, positions, seen=seen), None
    found = placed(slots, grids, tokens, positions + ahead)
    return found, found.amax(dim=(0, 2))[:, None] - positions.amax(dim=1, keepdim=True)
