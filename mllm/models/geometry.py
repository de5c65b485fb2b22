"""How an image becomes a square of pixels, and how many cells the encoder sees in it.

Kept apart from the encoders, so that loader workers need neither their classes nor their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RESIZE_RULES = ("squash", "crop", "pad")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
RESAMPLING_NAMES = ("nearest", "lanczos", "bilinear", "bicubic")
"""Names in the order of Pillow's numbers, which preprocessor_config.json files use."""

_REDUCING_GAP = 3.0  # Pillow halves a much larger image first; above 3 nobody sees a difference

_LONG = 16  # sides beyond this ratio: only what stays is scaled


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """What an encoder wants to see.

    Attributes:
        image_size: side of the square it takes, in pixels.
        cells: rows, and columns, of its feature grid.
        mean, std: per channel, of pixels in [0, 1].
        resize: "squash" changes the aspect, "crop" scales the short side and cuts the centre,
            "pad" scales the long side and fills with the mean colour.
        resampling: "nearest", "bilinear", "bicubic" or "lanczos".
        short_edge: for "crop", the short side before cutting (0: image_size).

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

    def __post_init__(self) -> None:
        if self.resize not in RESIZE_RULES:
            raise ValueError(f"unknown resize rule {self.resize!r}: {', '.join(RESIZE_RULES)}")
        if self.resampling not in _RESAMPLING:
            raise ValueError(f"unknown filter {self.resampling!r}: {', '.join(_RESAMPLING)}")
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
        """Return plain values for JSON."""
        return asdict(self)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the features of an image of this size in pixels."""
        return (self.cells, self.cells)

    def patches(self, height: int, width: int) -> int:
        """Return how many cells the encoder computes for an image of this size in pixels."""
        return self.cells * self.cells

    def preprocess(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize uint8 [H, W, 3] to uint8 [S, S, 3]; normalisation is the device's work."""
        side = self.image_size
        if pixels.shape[:2] == (side, side) and self.short_edge in (0, side):
            return np.ascontiguousarray(pixels)
        image = Image.fromarray(pixels)
        resized = {"squash": self._squash, "crop": self._crop, "pad": self._pad}[self.resize](image)
        return np.array(resized, dtype=np.uint8)

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize(
            (width, height), _RESAMPLING[self.resampling], reducing_gap=_REDUCING_GAP
        )

    def _squash(self, image: Image.Image) -> Image.Image:
        return self._resized(image, self.image_size, self.image_size)

    def _crop(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        edge = self.short_edge or self.image_size
        longer = int(edge * long / short)
        width, height = (edge, longer) if image.width <= image.height else (longer, edge)
        if longer > _LONG * edge:
            return self._crop_long(image, width, height)
        scaled = self._resized(image, width, height)
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
        return image.resize((side, side), _RESAMPLING[self.resampling], box=box)

    def _pad(self, image: Image.Image) -> Image.Image:
        side, long = self.image_size, max(image.size)
        width, height = (max(1, round(edge * side / long)) for edge in image.size)
        red, green, blue = (round(255 * value) for value in self.mean)
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        scaled = self._resized(image, width, height)
        canvas.paste(scaled, ((side - width) // 2, (side - height) // 2))
        return canvas
