"""What every way of cutting images is: an image as several squares.

S is the side of the encoder's square, M the visual tokens of a view.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm.models.errors import check_options
from mllm.models.geometry import Geometry, ImageGeometry, Size, Span
from mllm.parts.option import Option, chosen, problems

Spec = Mapping[str, Any]

WHOLE: Span = (0.0, 0.0, 1.0, 1.0)


class TiledGeometry(Geometry):
    """An image as several squares.

    Args:
        square: what the encoder wants to see.
        spec: the options by name.

    Attributes:
        OPTIONS: what a recipe may set beside `tiling`; declared in mllm/parts/tilings.py.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}

    def __init__(self, square: ImageGeometry, spec: Spec) -> None:
        self.square, self.spec = square, dict(spec)
        self.side = square.image_size
        self.mean, self.std = square.mean, square.std

    @classmethod
    def check(cls, spec: Spec) -> None:
        """Refuse options that make no sense.

        Raises:
            ValueError: an unknown option or a bad value.
        """
        options = {name: value for name, value in spec.items() if name != "tiling"}
        check_options(options, cls.OPTIONS, f"the tiling {spec['tiling']}")
        for _, problem in problems(cls.OPTIONS, options):
            raise ValueError(f"tiling {spec['tiling']}: {problem}")

    def _option(self, name: str) -> Any:
        return chosen(self.OPTIONS, self.spec, name)

    @classmethod
    def special_tokens(cls, spec: Spec) -> tuple[str, ...]:
        """Return the tokens that marks are made of, which a tokenizer must have."""
        return ()

    @property
    def smallest(self) -> Size:
        """The encoder's square."""
        return self.square.smallest

    def view_sizes(self, height: int, width: int) -> tuple[Size, ...]:
        """Return as many squares as the image makes."""
        return (self.smallest,) * self.count(height, width)

    @abstractmethod
    def count(self, height: int, width: int) -> int:
        """Return how many views an image of this size makes."""

    def grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the features of a square."""
        return self.square.grid(height, width)

    def spans(self, height: int, width: int) -> list[Span]:
        """Return what each tile shows, and the whole image for a view beside them."""
        rows, columns = self.tile_grid(height, width)
        tiles = [
            (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)
            for r in range(rows)
            for c in range(columns)
        ]
        return tiles + [WHOLE] * (self.count(height, width) - len(tiles))

    @abstractmethod
    def tile_grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the tiles of an image of this size."""

    def to_dict(self) -> dict[str, Any]:
        """Return what the encoder's geometry is; the tiling is stored beside it."""
        return self.square.to_dict()

    def _scaled(self, image: Image.Image, rows: int, columns: int) -> Image.Image:
        """Scale to so many squares, whatever the aspect."""
        return self.square.scaled(image, columns * self.side, rows * self.side)

    def _cut(self, canvas: Image.Image) -> list[NDArray[np.uint8]]:
        """Cut a canvas of whole squares, row by row."""
        side, array = self.side, np.array(canvas, dtype=np.uint8)
        rows, columns = array.shape[0] // side, array.shape[1] // side
        return [
            np.ascontiguousarray(array[r * side : (r + 1) * side, c * side : (c + 1) * side])
            for r in range(rows)
            for c in range(columns)
        ]
