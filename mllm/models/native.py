"""Native resolution: an image keeps its aspect, and its size within bounds.

Two published rules, followed to the pixel:

- `pixels`: Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1; `smart_resize`). Sides are
  rounded to whole blocks; an image outside the bounds is scaled first.
- `patches`: SigLIP 2 NaFlex (Tschannen et al. 2025, arXiv 2502.14786, section 2.4.2). Every image
  is scaled, up or down, to as many patches as are allowed.

A block is what becomes one visual token where the connector joins neighbouring patches: as many
patches in each direction as `merge` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, floor, sqrt
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm.models.geometry import RESAMPLING, Geometry, Size

LIMITS = ("min_pixels", "max_pixels", "max_patches")
"""The options that may change after training: no weight depends on them."""

_LONGEST = 200  # times the short side; Qwen's processor refuses longer images
_STEP = 1e-5  # of the scale that the second rule looks for
_LARGEST = 100.0


@dataclass(frozen=True, slots=True)
class NativeGeometry(Geometry):
    """Every image becomes one view of its own aspect.

    An image longer than 200 times its other side counts as one of 200 to 1: squashed.

    Attributes:
        patch: side of a patch in pixels.
        merge: patches of a block in each direction; sides are whole blocks.
        mean, std: per channel, of pixels in [0, 1].
        min_pixels, max_pixels: of a view, for the rule `pixels`; 0 for the other.
        max_patches: of a view, for the rule `patches`; 0 for the other.
        resampling: "nearest", "bilinear", "bicubic" or "lanczos".

    Raises:
        ValueError: no rule or both, or bounds that no view fits.
    """

    patch: int
    merge: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_pixels: int = 0
    max_pixels: int = 0
    max_patches: int = 0
    resampling: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("patch", "merge", *LIMITS):
            value = getattr(self, name)
            if type(value) is not int or value < (name not in LIMITS):
                raise ValueError(f"native resolution: {name} is no whole number: {value!r}")
        if self.resampling not in RESAMPLING:
            raise ValueError(f"unknown filter {self.resampling!r}: {', '.join(RESAMPLING)}")
        if bool(self.max_pixels) is bool(self.max_patches):
            raise ValueError("native resolution: give max_pixels or max_patches")
        if self.max_patches:
            return
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"native resolution: min_pixels {self.min_pixels} is more than max_pixels "
                f"{self.max_pixels}"
            )
        if self.max_pixels < self.block**2:
            raise ValueError(
                f"native resolution: max_pixels {self.max_pixels} is less than one block of "
                f"{self.block} x {self.block} pixels"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict` (JSON turns tuples into lists)."""
        fixed = {name: value for name, value in values.items() if name != "kind"}
        fixed["mean"], fixed["std"] = tuple(fixed["mean"]), tuple(fixed["std"])
        return cls(**fixed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"kind": "native", **asdict(self)}

    def within(self, limits: Mapping[str, Any]) -> Self:
        """Return the same geometry with other bounds.

        Raises:
            ValueError: a bound of the other rule, or one that is no number or fits no view.
        """
        for name in limits:
            if name not in LIMITS or bool(self.max_patches) is not (name == "max_patches"):
                own = ("max_patches",) if self.max_patches else ("min_pixels", "max_pixels")
                raise ValueError(
                    f"{name} is no bound of this encoder's images; it has {' and '.join(own)}"
                )
        return replace(self, **limits)

    @property
    def block(self) -> int:
        """Side of a block in pixels."""
        return self.patch * self.merge

    @property
    def smallest(self) -> Size:
        """What an image of one block becomes."""
        return self.size(self.block, self.block)

    @property
    def extremes(self) -> tuple[Size, ...]:
        """A dot and two lines: nobody knows what images will come."""
        return ((1, 1), (1, _LONGEST), (_LONGEST, 1))

    def view_sizes(self, height: int, width: int) -> tuple[Size, ...]:
        """Return the one view's size."""
        return (self.size(height, width),)

    def size(self, height: int, width: int) -> Size:
        """Return (height, width) of the view of an image of this size."""
        height, width = min(height, _LONGEST * width), min(width, _LONGEST * height)
        if self.max_patches:
            return self._most_patches(height, width)
        return self._between(height, width)

    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Scale an image to its view."""
        height, width = self.size(*pixels.shape[:2])
        if pixels.shape[:2] == (height, width):
            return [np.ascontiguousarray(pixels)]
        image = Image.fromarray(pixels).resize((width, height), RESAMPLING[self.resampling])
        return [np.array(image, dtype=np.uint8)]

    def grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of patches.

        Raises:
            ValueError: sides that are not whole blocks.
        """
        if height % self.block or width % self.block or not (height and width):
            raise ValueError(
                f"the encoder takes views whose sides are whole blocks of {self.block} pixels, not "
                f"{height} x {width}"
            )
        return height // self.patch, width // self.patch

    def _between(self, height: int, width: int) -> Size:
        """Round to whole blocks; outside the bounds scale first, and round towards them."""
        block, area = self.block, height * width
        high, wide = round(height / block) * block, round(width / block) * block
        if high * wide > self.max_pixels:
            shrink = sqrt(area / self.max_pixels)
            high = max(block, floor(height / shrink / block) * block)
            wide = max(block, floor(width / shrink / block) * block)
        elif high * wide < self.min_pixels:
            grow = sqrt(self.min_pixels / area)
            high = ceil(height * grow / block) * block
            wide = ceil(width * grow / block) * block
        return max(high, block), max(wide, block)

    def _most_patches(self, height: int, width: int) -> Size:
        """Find the largest scale by halving: sides are rounded up to whole blocks."""
        low, high = _STEP / 10, _LARGEST
        most = self.max_patches * self.patch**2
        while high - low >= _STEP:
            middle = (low + high) / 2
            if self._scaled(height, middle) * self._scaled(width, middle) <= most:
                low = middle
            else:
                high = middle
        return self._scaled(height, low), self._scaled(width, low)

    def _scaled(self, side: int, scale: float) -> int:
        return max(self.block, ceil(side * scale / self.block) * self.block)


def bounded(geometry: Geometry, limits: Mapping[str, Any]) -> NativeGeometry:
    """Return a geometry with other bounds; see `NativeGeometry.within`.

    Raises:
        ValueError: it has no bounds, or not these.
    """
    if not isinstance(geometry, NativeGeometry):
        side = geometry.smallest[0]
        raise ValueError(
            f"{next(iter(limits))}: this model's encoder takes squares of {side} pixels, which "
            "have no bounds to change"
        )
    return geometry.within(limits)
