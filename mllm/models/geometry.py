"""How an image becomes views, and how many cells the encoder sees in each.

A view is one thing that the encoder encodes. Kept apart from the encoders, so that loader workers
need neither their classes nor their weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RESIZE_RULES = ("squash", "crop", "pad")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
RESAMPLING_NAMES = ("nearest", "lanczos", "bilinear", "bicubic")
"""Names in the order of Pillow's numbers, which preprocessor_config.json files use."""

_LONG = 16  # sides beyond this ratio: only what stays is scaled


Size = tuple[int, int]
"""(height, width) in pixels, or (rows, columns) of a grid."""

Span = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of an image; beyond 0 and 1 is padding."""

OutputGrid = Callable[[Size], Size]
"""Grid of a view's features -> grid of its visual tokens: what the connector makes of it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What an image of one size becomes: views for the encoder, and its place in the text.

    Attributes:
        sizes: (height, width) of its views, in order.
        patches: cells that the encoder computes for them.
        grid: (rows, columns) of its visual tokens, (1, all of them) where they make no grid.
        writing: what stands in its slot, in order: so many visual tokens, or a mark as text.
        made: visual tokens that its views make, one view after another.
        order: for every visual token that is seen its place among those made, -1 for a newline.
            None: all of them as they are made.
    """

    sizes: tuple[Size, ...]
    patches: int
    grid: Size
    writing: tuple[int | str, ...]
    made: int
    order: NDArray[np.int64] | None = None

    @property
    def tokens(self) -> int:
        """Visual tokens in the slot."""
        return sum(piece for piece in self.writing if isinstance(piece, int))

    @property
    def visual(self) -> int:
        """Visual tokens that the language model sees, newlines included, in its slot or not."""
        return self.made if self.order is None else len(self.order)

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts between visual tokens."""
        return tuple(piece for piece in self.writing if isinstance(piece, str))


class Geometry(ABC):
    """What an encoder wants to see of an image.

    Attributes:
        NEWLINE: whether a layout refers to a newline, a learned row beside the visual tokens.
    """

    __slots__ = ()
    NEWLINE: ClassVar[bool] = False
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    @abstractmethod
    def smallest(self) -> Size:
        """(height, width) of the cheapest view that the encoder takes."""

    @property
    def most_cells(self) -> int:
        """Cells of the longest side of the views that `extremes` make."""
        views = [view for size in self.extremes for view in self.view_sizes(*size)]
        return max(max(self.grid(*view)) for view in views)

    @property
    def extremes(self) -> tuple[Size, ...]:
        """Sizes of images that make the fewest or narrowest cells: a connector must take them."""
        return (self.smallest,)

    @abstractmethod
    def view_sizes(self, height: int, width: int) -> tuple[Size, ...]:
        """Return (height, width) of the views of an image of this size."""

    @abstractmethod
    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Turn an image, uint8 [H, W, 3], into its views, uint8 [h, w, 3] of `view_sizes`.

        Pixels are not normalised: that is the device's work.
        """

    @abstractmethod
    def grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the features of a view of this size."""

    def layout(self, height: int, width: int, output_grid: OutputGrid) -> Layout:
        """Return what an image of this size becomes: its views' tokens one after another.

        Raises:
            ValueError: the connector cannot make tokens of a view's grid.
        """
        sizes = self.view_sizes(height, width)
        grids = [self.grid(*size) for size in sizes]
        tokens = [output_grid(grid) for grid in grids]
        made = sum(map(prod, tokens))
        grid = tokens[0] if len(tokens) == 1 else (1, made)
        return Layout(sizes, sum(map(prod, grids)), grid, (made,), made)

    def spans(self, height: int, width: int) -> list[Span]:
        """Return what each view shows of an image of this size: all of it, unless overridden."""
        return [(0.0, 0.0, 1.0, 1.0)] * len(self.view_sizes(height, width))

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, from which `geometry_from_dict` rebuilds it."""


@dataclass(frozen=True, slots=True)
class ImageGeometry(Geometry):
    """Every image becomes one square view.

    Attributes:
        image_size: side of the square it takes, in pixels.
        cells: rows, and columns, of its feature grid.
        mean, std: per channel, of pixels in [0, 1].
        resize: "squash" changes the aspect, "crop" scales the short side and cuts the centre,
            "pad" scales the long side and fills with the mean colour.
        resampling: "nearest", "bilinear", "bicubic" or "lanczos".
        short_edge: for "crop", the short side before cutting (0: image_size).
        class_cell: whether the class token is one more cell, before the others; then the features
            are one row, without places.

    Raises:
        ValueError: an unknown rule or filter, or a short edge below the image size.
    """

    image_size: int
    cells: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "squash"
    resampling: str = "bicubic"
    short_edge: int = 0
    class_cell: bool = False

    def __post_init__(self) -> None:
        if self.resize not in RESIZE_RULES:
            raise ValueError(f"unknown resize rule {self.resize!r}: {', '.join(RESIZE_RULES)}")
        if self.resampling not in RESAMPLING:
            raise ValueError(f"unknown filter {self.resampling!r}: {', '.join(RESAMPLING)}")
        if self.short_edge and self.short_edge < self.image_size:
            raise ValueError(
                f"short_edge {self.short_edge} is below image_size {self.image_size}: "
                "nothing could be cut out"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageGeometry:
        """Rebuild from `to_dict` (JSON turns tuples into lists)."""
        fixed = dict(values)
        fixed["mean"], fixed["std"] = tuple(fixed["mean"]), tuple(fixed["std"])
        return cls(**fixed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `class_cell` only where it is set."""
        values = asdict(self)
        if not self.class_cell:
            del values["class_cell"]
        return values

    @property
    def smallest(self) -> Size:
        """The square that it takes."""
        return (self.image_size, self.image_size)

    def view_sizes(self, height: int, width: int) -> tuple[Size, ...]:
        """Return one square, whatever the image."""
        return (self.smallest,)

    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Turn an image into one square."""
        return [self.preprocess(pixels)]

    def grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the features of a square."""
        return (1, self.cells**2 + 1) if self.class_cell else (self.cells, self.cells)

    def preprocess(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize uint8 [H, W, 3] to uint8 [S, S, 3]; normalisation is the device's work."""
        side = self.image_size
        if pixels.shape[:2] == (side, side) and self.short_edge in (0, side):
            return np.ascontiguousarray(pixels)
        image = Image.fromarray(pixels)
        resized = {"squash": self._squash, "crop": self._crop, "pad": self._pad}[self.resize](image)
        return np.array(resized, dtype=np.uint8)

    def spans(self, height: int, width: int) -> list[Span]:
        """Return what the square shows: a cut-out, or the whole with padding around it."""
        if self.resize == "squash":
            return [(0.0, 0.0, 1.0, 1.0)]
        if self.resize == "crop":
            edge = self.short_edge or self.image_size
            across, down = (
                self.image_size * min(height, width) / edge / n for n in (width, height)
            )
        else:
            across, down = max(height, width) / width, max(height, width) / height
        return [((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)]

    def scaled(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Scale to this size with the encoder's filter, whatever the aspect."""
        return image.resize((width, height), RESAMPLING[self.resampling])

    def _squash(self, image: Image.Image) -> Image.Image:
        return self.scaled(image, self.image_size, self.image_size)

    def _crop(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        edge = self.short_edge or self.image_size
        longer = int(edge * long / short)
        width, height = (edge, longer) if image.width <= image.height else (longer, edge)
        if longer > _LONG * edge:
            return self._crop_long(image, width, height)
        scaled = self.scaled(image, width, height)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        return scaled.crop((left, top, left + self.image_size, top + self.image_size))

    def _crop_long(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Compute only the centre: the whole of a long strip would take gigabytes."""
        side = self.image_size
        across, down = image.width / width, image.height / height  # pixels for one scaled pixel
        left, top = (width - side) // 2 * across, (height - side) // 2 * down
        box = (
            left,
            top,
            min(left + side * across, image.width),
            min(top + side * down, image.height),
        )
        return image.resize((side, side), RESAMPLING[self.resampling], box=box)

    def _pad(self, image: Image.Image) -> Image.Image:
        side, long = self.image_size, max(image.size)
        width, height = (max(1, round(edge * side / long)) for edge in image.size)
        red, green, blue = (round(255 * value) for value in self.mean)
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        scaled = self.scaled(image, width, height)
        canvas.paste(scaled, ((side - width) // 2, (side - height) // 2))
        return canvas


def geometry_from_dict(values: Mapping[str, Any]) -> Geometry:
    """Rebuild a geometry from its `to_dict`; without a `kind` it is a square."""
    from mllm.models.native import NativeGeometry

    if values.get("kind") == "native":
        return NativeGeometry.from_dict(values)
    return ImageGeometry.from_dict(values)
