"""What every vision encoder is: uint8 images in, one feature row per grid cell out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mllm.models.errors import check_options
from mllm.models.geometry import ImageGeometry


class VisionEncoder(nn.Module, ABC):
    """A vision encoder.

    Args:
        spec: what rebuilds the module without weights: `geometry` and what the class adds. It is
            stored in the model's config.json.

    Attributes:
        width: features per cell.
        geometry: what it wants to see, and its grid.
        OPTIONS: names that `from_folder` takes from a recipe.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("resize",)
    width: int

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.geometry = ImageGeometry.from_dict(spec["geometry"])

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

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Encode normalised images [I, 3, S, S] to [I, cells, width]."""

    @classmethod
    def from_folder(cls, path: str | Path, **options: Any) -> Self:
        """Build the encoder with its weights.

        Raises:
            ValueError: an unknown option, or the folder cannot be used.
        """
        check_options(options, cls.OPTIONS, f"the encoder {cls.__name__}")
        encoder = cls(cls.spec_from_folder(path, **options))
        encoder.load_weights(path)
        return encoder

    @property
    def image_size(self) -> int:
        """Side of the square image, in pixels."""
        return self.geometry.image_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per channel, of pixels in [0, 1]."""
        return self.geometry.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Per channel, of pixels in [0, 1]."""
        return self.geometry.std

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the features of an image of this size."""
        return self.geometry.grid(height, width)

    def patches(self, height: int, width: int) -> int:
        """Return how many cells an image of this size costs."""
        return self.geometry.patches(height, width)

    def preprocess(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize uint8 [H, W, 3] to the uint8 [S, S, 3] that `forward` takes."""
        return self.geometry.preprocess(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode uint8 [I, S, S, 3] to features [I, cells, width], row by row of the grid."""
        if pixels.ndim != 4 or pixels.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"the encoder takes pixels [images, {self.image_size}, {self.image_size}, 3], "
                f"got {list(pixels.shape)}"
            )
        mean = torch.tensor(self.mean, device=pixels.device)
        std = torch.tensor(self.std, device=pixels.device)
        images = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        return self.features(images.to(next(self.parameters()).dtype))

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
