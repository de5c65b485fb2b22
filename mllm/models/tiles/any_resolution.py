"""Tiles of one of some grids, their visual tokens one map.

LLaVA-NeXT, Liu et al. 2024, llava-vl.github.io/blog/2024-01-30-llava-next.
"""

from __future__ import annotations

from math import ceil, prod

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm import parts
from mllm.models.geometry import ImageGeometry, Layout, OutputGrid, Size, Span
from mllm.models.tiles.base import WHOLE, Spec, TiledGeometry


class AnyResolution(TiledGeometry):
    """The grid that keeps most of the image's pixels, and the whole image before its tiles.

    The image is scaled into the grid without changing its aspect, and padded with black. Visual
    tokens of the tiles are put together to one map, rows and columns that show nothing but padding
    are left out, and a newline, a learned row, ends every row of the map. So the connector must
    keep the views' grids.

    Without `grids` and `tiles` the grids are LLaVA-NeXT's. With `tiles` they are all of up to so
    many, as in LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326, section 3.2) but without its
    interpolation of larger ones.
    """

    OPTIONS = parts.TILINGS["any_resolution"].options
    NEWLINE = True

    def __init__(self, square: ImageGeometry, spec: Spec) -> None:
        super().__init__(square, spec)
        given = spec.get("grids") or ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        if most := spec.get("tiles"):
            sides = range(1, most + 1)
            given = [(rows, columns) for rows in sides for columns in sides]
            given = [grid for grid in given if prod(grid) <= most]
        self.grids: tuple[Size, ...] = tuple((rows, columns) for rows, columns in given)

    @classmethod
    def check(cls, spec: Spec) -> None:
        """Refuse two ways to choose grids at once, and grids of too many tiles."""
        super().check(spec)
        if spec.get("grids") is not None and spec.get("tiles") is not None:
            raise ValueError("tiling any_resolution: give grids or tiles, not both")
        most = max(map(prod, spec.get("grids") or ((1, 1),)))
        if most > parts.MOST_TILES:
            raise ValueError(
                f"tiling any_resolution: a grid of {most} tiles is too large; at most "
                f"{parts.MOST_TILES} are possible"
            )

    def tile_grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the tiles of an image of this size."""
        best, most, least_waste = self.grids[0], -1, 0
        for rows, columns in self.grids:
            high, wide = rows * self.side, columns * self.side
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), height * width)
            waste = high * wide - kept
            if kept > most or (kept == most and waste < least_waste):
                best, most, least_waste = (rows, columns), kept, waste
        return best

    def count(self, height: int, width: int) -> int:
        """Return the tiles and the whole image."""
        return 1 + prod(self.tile_grid(height, width))

    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Put the whole image first, then the tiles of the padded one."""
        image = Image.fromarray(pixels)
        rows, columns = self.tile_grid(image.height, image.width)
        high, wide = rows * self.side, columns * self.side
        across, down = wide / image.width, high / image.height
        size = (wide, min(ceil(image.height * across), high))
        if across >= down:
            size = (min(ceil(image.width * down), wide), high)
        canvas = Image.new("RGB", (wide, high))
        place = ((wide - size[0]) // 2, (high - size[1]) // 2)
        canvas.paste(self.square.scaled(image, *size), place)
        return [np.array(self._scaled(image, 1, 1)), *self._cut(canvas)]

    def spans(self, height: int, width: int) -> list[Span]:
        """Return the whole image, then what the tiles show of the padded one."""
        rows, columns = self.tile_grid(height, width)
        scale = min(columns * self.side / width, rows * self.side / height)
        across, down = columns * self.side / width / scale, rows * self.side / height / scale
        left, top = (1 - across) / 2, (1 - down) / 2
        tiles = [
            (
                left + across * c / columns,
                top + down * r / rows,
                left + across * (c + 1) / columns,
                top + down * (r + 1) / rows,
            )
            for r in range(rows)
            for c in range(columns)
        ]
        return [WHOLE, *tiles]

    def layout(self, height: int, width: int, output_grid: OutputGrid) -> Layout:
        """Return the whole image's tokens, then the map of the tiles, row by row with newlines."""
        cells = self.square.grid(self.side, self.side)
        rows, columns = output_grid(cells)
        if rows == 1 and columns > 1:
            raise ValueError(
                "tiling any_resolution puts the visual tokens of tiles together to one map, but "
                f"this connector makes a row of {columns} tokens without places; use tiling dynamic"
            )
        down, across = self.tile_grid(height, width)
        whole = rows * columns
        places = whole + np.arange(down * across * whole, dtype=np.int64)
        tiles = places.reshape(down, across, rows, columns).transpose(0, 2, 1, 3)
        shown = _without_padding(tiles.reshape(down * rows, across * columns), height, width)
        lines = np.concatenate([shown, np.full((len(shown), 1), -1)], axis=1)
        order = np.concatenate([np.arange(whole), lines.reshape(-1)]).astype(np.int64)
        sizes = self.view_sizes(height, width)
        return Layout(
            sizes,
            patches=len(sizes) * prod(cells),
            grid=(1, len(order)),
            writing=(len(order),),
            made=whole * len(sizes),
            order=order,
        )


def _without_padding(cells: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """Leave out rows or columns of a map that show padding around an image of this size.

    Rounding to seven digits before cutting off is the published code's.
    """
    rows, columns = cells.shape
    if width / height > columns / rows:
        pad = (rows - int(round(height * (columns / width), 7))) // 2
        return cells[pad : rows - pad]
    pad = (columns - int(round(width * (rows / height), 7))) // 2
    return cells[:, pad : columns - pad]
