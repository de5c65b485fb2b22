"""Views of different grids side by side: where their cells stand, and how they meet a module.

Legend: V views, C cells of all views, R and K rows and columns of the largest view, W width.
None of this has weights, so it may depend on the data; modules with weights are then called once
for all views, as sharded weights ask (a rank that called one twice would wait for the others).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int]


class Padding:
    """Cells [C, W] of all views to maps [V, R, K, W] with zeros where a view has no cell, and back.

    Args:
        grids: (rows, columns) of each view; (1, n) for views that are sequences.
        device: of the cells.

    Attributes:
        shape: (V, R, K).
        uniform: whether all views have the same grid, so that nothing is padded.
    """

    def __init__(self, grids: Sequence[Grid], device: torch.device) -> None:
        rows, columns = max(r for r, _ in grids), max(c for _, c in grids)
        self.shape = (len(grids), rows, columns)
        self.uniform = all(grid == (rows, columns) for grid in grids)
        self._counts = torch.tensor([r * c for r, c in grids], device=device)
        self._places: Tensor | None = None
        if not self.uniform:
            whole = torch.arange(len(grids) * rows * columns).view(self.shape)
            boxes = [whole[i, :r, :c].flatten() for i, (r, c) in enumerate(grids)]
            self._places = torch.cat(boxes).to(device)

    def spread(self, cells: Tensor) -> Tensor:
        """Return the maps [V, R, K, W] of cells [C, W]."""
        if self._places is not None:
            views, rows, columns = self.shape
            blank = cells.new_zeros(views * rows * columns, cells.shape[1])
            cells = blank.index_copy(0, self._places, cells)
        return cells.view(*self.shape, cells.shape[1])

    def gather(self, maps: Tensor) -> Tensor:
        """Return the cells [C, W] of maps [V, R, K, W]."""
        flat = maps.flatten(0, 2)
        return flat if self._places is None else flat.index_select(0, self._places)

    def mask(self) -> Tensor | None:
        """Return bool [V, R x K], true where a view has a cell; None if all have all."""
        if self._places is None:
            return None
        views, rows, columns = self.shape
        seen = torch.zeros(views * rows * columns, dtype=torch.bool, device=self._places.device)
        return seen.index_fill(0, self._places, True).view(views, -1)

    def mean(self, cells: Tensor) -> Tensor:
        """Return each view's mean [V, W] over its own cells."""
        total = self.spread(cells).sum(dim=(1, 2))
        return total / self._counts[:, None].to(total.dtype)

    def repeat(self, rows: Tensor) -> Tensor:
        """Return [C, W]: to every cell the row of its view, of rows [V, W]."""
        return rows.repeat_interleave(self._counts, dim=0, output_size=self.cells)

    @property
    def cells(self) -> int:
        """C."""
        views, rows, columns = self.shape
        return views * rows * columns if self._places is None else len(self._places)


def sequences(grids: Sequence[Grid], device: torch.device) -> Padding:
    """Return the padding of the views as sequences: maps [V, 1, L, W], L cells of the longest."""
    return Padding([(1, rows * columns) for rows, columns in grids], device)


def pool(cells: Tensor, grids: Sequence[Grid], side: int) -> Tensor:
    """Average the cells [C, W] of each view to a side x side grid: [V x side x side, W]."""
    views = cells.split([rows * columns for rows, columns in grids])
    pooled: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        members = [i for i, other in enumerate(grids) if other == grid]
        maps = torch.stack([views[i] for i in members]).unflatten(1, grid).permute(0, 3, 1, 2)
        small = functional.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2)
        pooled.update(zip(members, small, strict=True))
    return torch.cat([pooled[i] for i in range(len(grids))])


def blocks(grid: Grid, factor: int) -> Grid:
    """Return (rows, columns) of a grid in blocks of factor x factor cells, the last ones padded."""
    return -(-grid[0] // factor), -(-grid[1] // factor)


def check_block(name: str, factor: int, cells: int) -> None:
    """Refuse a block that is larger than the longest side of any view, in cells.

    Raises:
        ValueError: naming the connector, and what is possible.
    """
    if factor > cells:
        raise ValueError(
            f"connector {name}: factor {factor} is more than the {cells} cells of a side that the "
            f"encoder gives; it can be 1 to {cells}"
        )


def space_to_depth(cells: Tensor, grids: Sequence[Grid], factor: int) -> Tensor:
    """Join blocks of factor x factor cells [C, W] into one wide cell: [M, factor x factor x W].

    A wide cell lists its block row by row, every cell with all its channels: (row, column,
    channel), which is not torch's `pixel_unshuffle` (channel, row, column). Views whose sides the
    factor does not divide count as if they went on with zeros on the right and below.
    """
    places, first = [], 0
    for rows, columns in grids:
        across = -(-columns // factor)
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        block = first + (row // factor) * across + column // factor
        places.append((block * factor**2 + row % factor * factor + column % factor).flatten())
        first += -(-rows // factor) * across
    blank = cells.new_zeros(first * factor**2, cells.shape[1])
    spread = blank.index_copy(0, torch.cat(places).to(cells.device), cells)
    return spread.view(first, factor**2 * cells.shape[1])
