"""Tiles of the scaled image, each named by a mark in the text.

Idefics3 and SmolVLM, Laurençon et al. 2024, arXiv 2408.12637, section 3.2.
"""

from __future__ import annotations

from math import ceil, prod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm import parts
from mllm.models.geometry import ImageGeometry, Layout, OutputGrid, Size
from mllm.models.tiles.base import Spec, TiledGeometry


class SplitTiles(TiledGeometry):
    """The image at its aspect on whole tiles, each named by a mark, and the whole image last.

    The long edge is scaled to `longest_edge` (4 S unless given), then both edges to whole tiles. In
    the text a tile is `<fake_token_around_image><row_1_col_2>` and its tokens, a line of tiles ends
    with a newline, and the whole image is `<global-img>`.
    """

    OPTIONS = parts.TILINGS["split"].options
    MOST: ClassVar[int] = 6
    AROUND: ClassVar[str] = "<fake_token_around_image>"
    WHOLE: ClassVar[str] = "<global-img>"

    def __init__(self, square: ImageGeometry, spec: Spec) -> None:
        super().__init__(square, spec)
        self.longest_edge = int(spec.get("longest_edge") or 4 * self.side)
        if not self.side <= self.longest_edge <= self.MOST * self.side:
            raise ValueError(
                f"tiling split: longest_edge {self.longest_edge} is not between one tile of "
                f"{self.side} pixels and {self.MOST} of them, {self.MOST * self.side}; there are "
                "no marks for more"
            )

    @classmethod
    def special_tokens(cls, spec: Spec) -> tuple[str, ...]:
        """Return the marks around an image, of the whole, and of every tile."""
        sides = range(1, cls.MOST + 1)
        tiles = [f"<row_{row}_col_{column}>" for row in sides for column in sides]
        return (cls.AROUND, cls.WHOLE, *tiles)

    def tile_grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the tiles, (0, 0) for an image that is one view."""
        if self.spec.get("whole_only"):
            return (0, 0)
        high, wide = self._on_tiles(*self._long_edge_scaled(height, width))
        if high <= self.side and wide <= self.side:
            return (0, 0)
        return high // self.side, wide // self.side

    def count(self, height: int, width: int) -> int:
        """Return the tiles and the whole image."""
        return 1 + prod(self.tile_grid(height, width))

    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Scale twice, as the rule does, then cut; the whole image comes last."""
        image = Image.fromarray(pixels)
        high, wide = self._long_edge_scaled(image.height, image.width)
        image = self.square.scaled(image, wide, high)
        if self.spec.get("whole_only"):
            return [np.array(self._scaled(image, 1, 1))]
        high, wide = self._on_tiles(high, wide)
        image = self.square.scaled(image, wide, high)
        if high <= self.side and wide <= self.side:
            return [np.array(image)]
        return [*self._cut(image), np.array(self._scaled(image, 1, 1))]

    def layout(self, height: int, width: int, output_grid: OutputGrid) -> Layout:
        """Return the tokens of tiles and whole image between their marks."""
        cells = self.square.grid(self.side, self.side)
        grid = output_grid(cells)
        rows, columns = self.tile_grid(height, width)
        each, ending = prod(grid), ""
        writing: list[int | str] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                writing += [f"{ending}{self.AROUND}<row_{row}_col_{column}>", each]
                ending = ""
            ending = "\n"
        writing += [f"{ending}{ending}{self.AROUND}{self.WHOLE}", each, self.AROUND]
        sizes = self.view_sizes(height, width)
        made = len(sizes) * each
        return Layout(
            sizes,
            patches=len(sizes) * prod(cells),
            grid=grid if len(sizes) == 1 else (1, made),
            writing=tuple(writing),
            made=made,
        )

    def _long_edge_scaled(self, height: int, width: int) -> Size:
        """Scale the long edge to `longest_edge`, the other to an even number."""
        aspect, long = width / height, self.longest_edge
        if width >= height:
            short = int(long / aspect)
            return short + short % 2 or 1, long
        short = int(long * aspect)
        return long, short + short % 2 or 1

    def _on_tiles(self, height: int, width: int) -> Size:
        """Scale up to whole tiles: the long edge, then what the aspect makes of the other."""
        side, aspect = self.side, width / height
        if width >= height:
            wide = ceil(width / side) * side
            return ceil(max(1, int(wide / aspect)) / side) * side, wide
        high = ceil(height / side) * side
        return high, ceil(max(1, int(high * aspect)) / side) * side
