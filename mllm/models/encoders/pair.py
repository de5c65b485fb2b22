"""Two encoders side by side, their features concatenated (Karamcheti et al. 2024, Prismatic,
arXiv 2402.07865; Tong et al. 2024, arXiv 2401.06209)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mllm.models.encoders.base import VisionEncoder
from mllm.models.errors import choose
from mllm.models.geometry import ImageGeometry
from mllm.parts import ENCODERS as PARTS_OF_RECIPES

PARTS = ("first", "second")


class PairEncoder(VisionEncoder):
    """Features of two encoders of one image, concatenated along the width on the first's grid.

    A recipe gives each with its own name, path and options; there is no path of the pair:

        encoder:
          name: pair
          first: {name: siglip, path: weights/siglip-so400m-patch14-384}
          second: {name: dinov2, path: weights/dinov2-large, layer: -2}

    An image becomes one square, of the larger of the two sides, by the first's rule (crop, squash
    or pad; `resize` gives another) and filter. Each encoder gets that view: scaled down on the
    device if its own side is smaller, and normalised with its own mean and deviation. Features of
    the second are resampled to the first's grid, as Cambrian-1 does (Tong et al. 2024, arXiv
    2406.16860), with averaging where the grid shrinks.

    This differs from Prismatic, where each encoder has its own transform of the image file: here
    both see the same region, so that cells beside each other show the same place; the smaller
    view was resized twice; and its grids may differ.

    Spec: `first` and `second`, each `name` (key of ENCODERS) and that family's spec, and
    `geometry`.
    """

    OPTIONS = PARTS_OF_RECIPES["pair"].options

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.first, self.second = (_family(spec[part], part)(spec[part]) for part in PARTS)
        self.width = self.first.width + self.second.width

    @classmethod
    def spec_from_folder(cls, path: str | Path | None = None, **options: Any) -> dict[str, Any]:
        """Read the configuration files of both."""
        if path is not None:
            raise ValueError("a pair has no path of its own; give first.path and second.path")
        resize = {} if options.get("resize") is None else {"resize": options["resize"]}
        specs = {part: _part_spec(options.get(part), part, resize) for part in PARTS}
        first, second = (ImageGeometry.from_dict(specs[part]["geometry"]) for part in PARTS)
        side = max(first.image_size, second.image_size)
        geometry = replace(
            first, image_size=side, short_edge=round(first.short_edge * side / first.image_size)
        )
        return {**specs, "geometry": geometry.to_dict()}

    @classmethod
    def from_folder(cls, path: str | Path | None = None, **options: Any) -> Self:
        """Build both with their weights; errors as each family's."""
        encoder = cls.described(path=path, **options)
        encoder.first.load_weights(options["first"]["path"])
        encoder.second.load_weights(options["second"]["path"])
        return encoder

    def load_weights(self, path: str | Path) -> None:
        """Each part has its own folder: see `from_folder`."""
        raise NotImplementedError("load the weights of the parts, first and second")

    def features(self, images: Tensor) -> Tensor:
        """Encode [I, 3, S, S], normalised as the first wants them, to [I, cells, width]."""
        first = self.first.features(self._view(images, self.first))
        second = self.second.features(self._view(images, self.second))
        return torch.cat([first, _on_grid(second, self.square.cells)], dim=-1)

    def _view(self, images: Tensor, part: VisionEncoder) -> Tensor:
        """The same images [I, 3, s, s] at the side and with the normalisation of a part."""
        own, part_side = (self.mean, self.std), part.image_size
        if part_side == self.image_size and own == (part.mean, part.std):
            return images
        pixels = images.float() * _channels(self.std, images) + _channels(self.mean, images)
        if part_side != self.image_size:
            pixels = interpolate(pixels, (part_side, part_side), mode="bicubic", antialias=True)
            pixels = pixels.clamp(0, 1)
        view = (pixels - _channels(part.mean, images)) / _channels(part.std, images)
        return view.to(images.dtype)


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None, None]


def _on_grid(features: Tensor, cells: int) -> Tensor:
    """Resample features [I, n * n, D] to [I, cells * cells, D]."""
    side = isqrt(features.shape[1])
    if side == cells:
        return features
    maps = features.transpose(1, 2).unflatten(2, (side, side)).float()
    scaled = interpolate(maps, (cells, cells), mode="bilinear", antialias=True)
    return scaled.flatten(2).transpose(1, 2).to(features.dtype)


def _family(section: Mapping[str, Any], part: str) -> type[VisionEncoder]:
    from mllm.models.encoders import ENCODERS  # the registry also names the pair

    name = section.get("name")
    if name == "pair":
        raise ValueError(f"{part}: a pair of pairs is not supported")
    return choose(ENCODERS, str(name), f"encoder of {part}")


def _part_spec(section: Any, part: str, resize: Mapping[str, Any]) -> dict[str, Any]:
    """Read one part's folder."""
    if not isinstance(section, Mapping) or not section.get("name") or not section.get("path"):
        raise ValueError(f"the encoder pair needs {part}: {{name: …, path: …}}")
    family = _family(section, part)
    if "resize" in section:
        raise ValueError(f"{part}: both see one view of an image; give resize to the pair")
    options = {
        key: value
        for key, value in section.items()
        if key not in ("name", "path") and value is not None
    }
    family.check(options, part)
    if "resize" not in family.OPTIONS:
        raise ValueError(
            f"{part}: {section['name']} takes images as they are, a pair takes squares"
        )
    spec = family.spec_from_folder(section["path"], **options, **resize)
    if spec["geometry"].get("class_cell"):
        raise ValueError(f"{part}: the class token has no place on a grid; give class_cell: false")
    return {"name": section["name"], **spec}
