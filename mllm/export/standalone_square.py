"""What the encoder sees of an image, for encoders of squares: one, or tiles.

See `standalone`, with which this becomes one file; `standalone_native` has the same names for
encoders that take images as they are. V views of all images, S side of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from mllm.export.standalone_images import flat, image_layout, opened, rows_of
from mllm.models.geometry import Geometry, ImageGeometry, Layout, Size
from mllm.models.tiles import tiled


def image_geometry(square: dict[str, Any], images: dict[str, Any]) -> Geometry:
    """Return how an image becomes views: `square` and `images` as the configuration has them."""
    # tiles
    if images:
        return tiled(ImageGeometry.from_dict(square), images)
    # end
    return ImageGeometry.from_dict(square)


def sizes_of(pixel_values: Tensor, original_sizes: Tensor | None) -> list[list[int]]:
    """Return rows for `image_layouts`; without sizes every view is an image of its size."""
    if original_sizes is None:
        return [list(pixel_values.shape[-2:])] * len(pixel_values)
    rows: list[list[int]] = original_sizes.tolist()
    return rows


def image_layouts(
    geometry: Geometry, connector: dict[str, Any], original_sizes: Sequence[Sequence[int]]
) -> list[Layout]:
    """Return the layout of every image, of a row (height, width) of its pixels for each view."""
    layouts: list[Layout] = []
    view = 0
    while view < len(original_sizes):
        height, width = original_sizes[view]
        layouts.append(image_layout(geometry, connector, int(height), int(width)))
        view += len(layouts[-1].sizes)
    if view != len(original_sizes):
        raise ValueError(f"original_sizes has {len(original_sizes)} rows, not whole images")
    return layouts


def image_rows(layout: Layout) -> int:
    """Return how many rows of `pixel_values` an image has: a view each."""
    return len(layout.sizes)


def pick_images(
    pixel_values: Tensor,
    original_sizes: Tensor | None,
    layouts: Sequence[Layout],
    images: Sequence[int],
) -> tuple[Tensor, Tensor | None]:
    """Return both for these images, in this order."""
    views = rows_of([len(layout.sizes) for layout in layouts], images)
    return pixel_values[views], None if original_sizes is None else original_sizes[views]


def encode_images(
    tower: Any, pixel_values: Tensor, layouts: Sequence[Layout]
) -> tuple[Tensor, list[Size]]:
    """Return features [V, cells, Dv] of views [V, 3, S, S] and the grid of each."""
    grid = tower.grid(*tower.geometry.smallest)
    return tower.features(pixel_values), [grid] * len(pixel_values)


class MllmImageProcessor(BaseImageProcessor):
    """Images to normalised views, exactly as the model was trained; needs Pillow, no torchvision.

    Args:
        geometry: what the encoder wants to see, see `ImageGeometry`.
        images: how images are cut into tiles; empty for not at all.
        connector: the connector's `name` and options, which say how many tokens an image takes.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "original_sizes"]  # type: ignore[misc]

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
        """Height and width of an image that becomes as many views as any; vLLM asks for it."""
        side = self.geometry["image_size"]
        # tiles
        rule = image_geometry(self.geometry, self.images)
        sides = [side * count for count in range(1, 1 + max(12, self.images.get("tiles") or 0))]
        sizes = [(height, width) for height in sides for width in sides]
        height, width = max(sizes, key=lambda size: len(rule.view_sizes(*size)))
        return {"height": height, "width": width}
        # end
        return {"height": side, "width": side}

    def fetch_images(self, images: Any) -> Any:
        """Return images as uint8 [H, W, 3]; see `opened`."""
        return opened(images)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Return the views of images, as `read_image` and `pixels_of` take them.

        Other arguments that transformers passes are not used: how an image is prepared is part of
        the model.

        Returns:
            pixel_values [V, 3, S, S], the views of all images in order, and original_sizes [V, 2],
            (height, width) of the image that each view was made of.
        """
        rule = image_geometry(self.geometry, self.images)
        views, sizes = [], []
        for pixels in flat(self.fetch_images(images)):
            made = rule.views(pixels)
            views += made
            sizes += [pixels.shape[:2]] * len(made)
        batch = torch.from_numpy(np.stack(views)).float() / 255
        batch = (batch - torch.tensor(rule.mean)) / torch.tensor(rule.std)
        data = {
            "pixel_values": batch.permute(0, 3, 1, 2).contiguous(),
            "original_sizes": torch.tensor(sizes),
        }
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))
