"""Tiles of the grid whose aspect is nearest to the image's.

InternVL 1.5, Chen et al. 2024, arXiv 2404.16821, section 3.1.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm import parts
from mllm.models.geometry import Size
from mllm.models.tiles.base import Spec, TiledGeometry
from mllm.parts.option import chosen


class DynamicTiles(TiledGeometry):
    """The grid whose aspect is nearest to the image's, and a thumbnail after its tiles.

    Of grids of one aspect the larger is taken while the image has more than half its pixels. An
    image of one tile has no thumbnail.
    """

    OPTIONS = parts.TILINGS["dynamic"].options

    @classmethod
    def check(cls, spec: Spec) -> None:
        """Refuse more tiles at least than at most."""
        super().check(spec)
        if chosen(cls.OPTIONS, spec, "min_tiles") > chosen(cls.OPTIONS, spec, "tiles"):
            raise ValueError(
                f"tiling dynamic: min_tiles {chosen(cls.OPTIONS, spec, 'min_tiles')} is more than "
                f"tiles {chosen(cls.OPTIONS, spec, 'tiles')}"
            )

    def tile_grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the tiles of an image of this size."""
        most, fewest = self._option("tiles"), self._option("min_tiles")
        grids = [
            (rows, columns)
            for columns in range(1, most + 1)
            for rows in range(1, most + 1)
            if fewest <= rows * columns <= most
        ]
        best, least = (1, 1), float("inf")
        for rows, columns in sorted(grids, key=prod):
            off = abs(width / height - columns / rows)
            large = height * width > 0.5 * self.side**2 * rows * columns
            if off < least or (off == least and large):
                best, least = (rows, columns), off
        return best

    def count(self, height: int, width: int) -> int:
        """Return the tiles and, if there are several, the thumbnail."""
        tiles = prod(self.tile_grid(height, width))
        return tiles + (tiles > 1 and self._option("thumbnail"))

    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Cut the image, scaled to its grid; the thumbnail comes last."""
        image = Image.fromarray(pixels)
        tiles = self._cut(self._scaled(image, *self.tile_grid(*pixels.shape[:2])))
        if len(tiles) > 1 and self._option("thumbnail"):
            tiles.append(np.array(self._scaled(image, 1, 1)))
        return tiles
