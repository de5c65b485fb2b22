"""What every vision encoder is: uint8 views in, one feature row per grid cell out.

Shapes: V views (a view is one thing that the encoder encodes), B bytes of all their pixels, S side
of a square view, C cells of all views, Dv features of a cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mllm.models.errors import check_options
from mllm.models.geometry import Geometry, ImageGeometry
from mllm.parts.option import Option, problems


class VisionEncoder(nn.Module, ABC):
    """A vision encoder.

    A family whose views are all squares of one size implements `features`; one that takes views as
    they are overrides `forward`, `grids` and `blank` instead.

    Args:
        spec: what rebuilds the module without weights: `geometry` and what the class adds. It is
            stored in the model's config.json.

    Attributes:
        width: Dv, features per cell.
        geometry: what it wants to see, and its grid; GEOMETRY is its class.
        OPTIONS: what `from_folder` takes from a recipe, by name; declared in
            mllm/parts/encoders.py.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    width: int
    geometry: Geometry
    GEOMETRY: ClassVar[Any] = ImageGeometry

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.geometry = self.GEOMETRY.from_dict(spec["geometry"])

    @classmethod
    @abstractmethod
    def spec_from_folder(cls, path: str | Path, **options: Any) -> dict[str, Any]:
        """Read the configuration files of a folder (or hub id); no weights.

        Raises:
            ValueError: not a folder of this family, or a file is missing or damaged.
        """

    @abstractmethod
    def load_weights(self, path: str | Path) -> None:
        """Load the weights of the folder (or hub id) that the spec was read from.

        Raises:
            ValueError: missing, cut short, or of another shape.
        """

    def features(self, images: Tensor) -> Tensor:
        """Encode normalised views [V, 3, S, S] to [V, cells, Dv], row by row of the grid."""
        raise NotImplementedError(f"{type(self).__name__} has neither `features` nor `forward`")

    @classmethod
    def check(cls, options: Mapping[str, Any], part: str = "") -> None:
        """Refuse options that make no sense; `part` tells which of several encoders it is.

        Raises:
            ValueError: an unknown option, a bad value or none where one is needed.
        """
        what = f"the encoder {cls.__name__}" + (f" ({part})" if part else "")
        check_options(options, cls.OPTIONS, what)
        for _, problem in problems(cls.OPTIONS, options):
            raise ValueError(f"{what}: {problem}")

    @classmethod
    def from_folder(cls, path: str | Path, **options: Any) -> Self:
        """Build the encoder with its weights.

        Raises:
            ValueError: a wrong option, or the folder cannot be used.
        """
        encoder = cls.described(path=path, **options)
        encoder.load_weights(path)
        return encoder

    @classmethod
    def described(cls, **options: Any) -> Self:
        """Build the encoder of a folder (`path`) as its configuration says; no weights are read.

        Raises:
            ValueError: as `from_folder`.
        """
        path = {"path": options.pop("path")} if "path" in options else {}
        cls.check(options)
        return cls(cls.spec_from_folder(**path, **options))

    @property
    def square(self) -> ImageGeometry:
        """The geometry of a family whose views are all squares of one size."""
        assert isinstance(self.geometry, ImageGeometry)
        return self.geometry

    @property
    def image_size(self) -> int:
        """Side of the square image, in pixels."""
        return self.square.image_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per channel, of pixels in [0, 1]."""
        return self.geometry.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Per channel, of pixels in [0, 1]."""
        return self.geometry.std

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the features of a view of this size."""
        return self.geometry.grid(height, width)

    def grids(self, sizes: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
        """Return (rows, columns) of the features of views of these (height, width)."""
        return [self.grid(height, width) for height, width in sizes]

    def blank(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Return the pixels [B] and the sizes [1, 2] of a black view, the cheapest one to encode.

        A rank without images encodes it. Only the pixels go to the device.
        """
        height, width = self.geometry.smallest
        pixels = torch.zeros(height * width * 3, dtype=torch.uint8, device=device)
        return pixels, torch.tensor([[height, width]], dtype=torch.int32, device="cpu")

    def patches(self, height: int, width: int) -> int:
        """Return how many cells a view of this size costs."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def preprocess(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize uint8 [H, W, 3] to the uint8 [S, S, 3] that the encoder takes."""
        return self.square.preprocess(pixels)

    def forward(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Encode views to features [C, Dv], one view after another, row by row of its grid.

        Args:
            pixels: uint8 [B], each view as [height, width, 3], one after another.
            sizes: [V, 2], (height, width) of each; on the CPU, or a GPU is waited for.

        Raises:
            ValueError: a view of a size that the encoder does not take, or pixels that are more or
                fewer than the sizes say.
        """
        images = self.normalised(self.squares(pixels, sizes)).permute(0, 3, 1, 2)
        return self.features(images.to(next(self.parameters()).dtype)).flatten(0, 1)

    def squares(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return the pixels [B] as views [V, S, S, 3], not copied; errors as `forward`."""
        side, views = self.image_size, sizes.tolist()
        others = [view for view in views if view != [side, side]]
        if others:
            raise ValueError(
                f"the encoder takes views of {side} x {side} pixels, but {len(others)} of "
                f"{len(views)} are others, {others[0][0]} x {others[0][1]} first"
            )
        if pixels.shape != (len(views) * side * side * 3,):
            raise ValueError(
                f"{len(views)} views of {side} x {side} have {len(views) * side * side * 3} bytes "
                f"of pixels, got {list(pixels.shape)}"
            )
        return pixels.view(len(views), side, side, 3)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return uint8 [..., 3] as floats around zero, as the encoder was trained."""
        mean = torch.tensor(self.mean, device=pixels.device)
        std = torch.tensor(self.std, device=pixels.device)
        return (pixels.float() / 255 - mean) / std

    @property
    def trains(self) -> bool:
        """Whether any weight is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> Self:
        """Enter train mode only if something trains, and keep batch norm out of it.

        Statistics of a batch would carry one document's images into another's features.
        """
        super().train(mode and self.trains)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.training = False
        return self
