"""What the encoder sees of an image, for encoders of native resolution: all of it, at its aspect.

See `standalone`, with which this becomes one file; the names are those of `standalone_square`, and
what is called `original_sizes` there and in `standalone` is `image_grid_thw` here. I images, C
patches of all images, p side of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt, prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from mllm.export.standalone_images import flat, image_layout, opened, rows_of, token_grid
from mllm.models.geometry import Layout, Size
from mllm.models.native import NativeGeometry


def image_geometry(native: dict[str, Any], images: dict[str, Any]) -> NativeGeometry:
    """Return how an image becomes a view: `native` as the configuration has it, never tiles."""
    return NativeGeometry.from_dict(native)


def sizes_of(pixel_values: Tensor, image_grid_thw: Tensor | None) -> list[list[int]]:
    """Return rows for `image_layouts`."""
    if image_grid_thw is None:
        raise ValueError("pixel_values need image_grid_thw, which says what image they are of")
    rows: list[list[int]] = image_grid_thw.tolist()
    return rows


def image_layouts(
    geometry: NativeGeometry, connector: dict[str, Any], image_grid_thw: Sequence[Sequence[int]]
) -> list[Layout]:
    """Return the layout of every image, of its (1, rows, columns) of patches."""
    layouts, patch = [], geometry.patch
    for _, rows, columns in image_grid_thw:
        grid = token_grid(connector)((rows, columns))
        size, tokens = (rows * patch, columns * patch), prod(grid)
        layouts.append(Layout((size,), rows * columns, grid, (tokens,), tokens))
    return layouts


def image_rows(layout: Layout) -> int:
    """Return how many rows of `pixel_values` an image has: a patch each."""
    return layout.patches


def pick_images(
    pixel_values: Tensor, image_grid_thw: Tensor, layouts: Sequence[Layout], images: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return both for these images, in this order."""
    patches = rows_of([layout.patches for layout in layouts], images)
    return pixel_values[patches], image_grid_thw[list(images)]


def encode_images(
    tower: Any, pixel_values: Tensor, layouts: Sequence[Layout]
) -> tuple[Tensor, list[Size]]:
    """Return features [C, Dv] of patches [C, p x p x 3] and each image's grid of them."""
    grids = [tower.grid(*layout.sizes[0]) for layout in layouts]
    patch = tower.geometry.patch
    maps = [
        patches.view(*grid, patch, patch, 3).transpose(1, 2)
        for patches, grid in zip(pixel_values.split([*map(prod, grids)]), grids, strict=True)
    ]
    return tower.encode(maps, grids), grids


class MllmImageProcessor(BaseImageProcessor):
    """Images to normalised patches, exactly as the model was trained; Pillow, no torchvision.

    Args:
        geometry: what the encoder wants to see, see `NativeGeometry`. The bounds in it may change:
            the model takes images of any size.
        images: empty; other encoders cut images into tiles.
        connector: the connector's `name` and options, which say how many tokens an image takes.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_grid_thw"]  # type: ignore[misc]

    def __init__(
        self,
        geometry: dict[str, Any] | None = None,
        images: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.geometry, self.images = dict(geometry or {}), dict(images or {})
        self.connector = dict(connector or {})

    @property
    def size(self) -> dict[str, int]:
        """Height and width of an image that takes as many tokens as any; vLLM asks for it."""
        rule = image_geometry(self.geometry, self.images)
        height, width = max(
            _largest_sizes(rule),
            key=lambda size: image_layout(rule, self.connector, *size).tokens,
        )
        return {"height": height, "width": width}

    def fetch_images(self, images: Any) -> Any:
        """Return images as uint8 [H, W, 3]; see `opened`."""
        return opened(images)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Return the patches of images, as `read_image` and `pixels_of` take them.

        Other arguments that transformers passes are not used: how an image is prepared is part of
        the model.

        Returns:
            pixel_values [C, p x p x 3], the patches of all images in order, row by row, and in each
            its pixels row by row, all channels of a pixel together; image_grid_thw [I, 3], of each
            image (1, rows, columns) of its patches.
        """
        rule = image_geometry(self.geometry, self.images)
        mean, std, patch = torch.tensor(rule.mean), torch.tensor(rule.std), rule.patch
        patches, grids = [], []
        for pixels in flat(self.fetch_images(images)):
            view = (torch.from_numpy(rule.views(pixels)[0]).float() / 255 - mean) / std
            rows, columns = rule.grid(*view.shape[:2])
            cells = view.view(rows, patch, columns, patch, 3).transpose(1, 2)
            patches.append(cells.reshape(rows * columns, -1))
            grids.append((1, rows, columns))
        data = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))


def _largest_sizes(rule: NativeGeometry) -> Iterator[Size]:
    """Sizes of images of all aspects, among which are those with the most tokens.

    A connector that pads its last blocks makes more tokens of a long image than of a square.
    """
    block = rule.block
    blocks = rule.max_patches // rule.merge**2 or rule.max_pixels // block**2
    sizes = [(1, 200), (block // 2, 100 * block)]  # no longer ones are told apart
    for rows in range(1, isqrt(blocks) + 1):
        short, long = rows * block, blocks // rows * block
        sizes += [(short, long), (short + (block - 1) // 2, long), (short, 200 * short)]
    for rows in range(1, isqrt(rule.min_pixels) // block + 1):  # enlarged to just over these rows
        aspect = rule.min_pixels / (rows * block) ** 2
        sizes += [(short, int(short * aspect)) for short in range(1, 65)]
    for height, width in sizes:
        yield from ((height, width), (width, height))
