"""What the image processors of an exported folder share, whatever the encoder sees of an image.

See `standalone`, with which this becomes one file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data_packing.images import FORMATS
from mllm.models.connectors import CONNECTORS
from mllm.models.geometry import Geometry, Layout, OutputGrid
from mllm.models.pictures import pixels_of, read_image


def opened(images: Any) -> Any:
    """Return images as uint8 [H, W, 3], whatever they are given as, in lists too."""
    if isinstance(images, list | tuple):
        return [opened(image) for image in images]
    if getattr(images, "ndim", 0) == 4:
        return [pixels_of(image) for image in images]
    return pixels_of(open_image(images) if isinstance(images, str | Path | bytes) else images)


def flat(images: Any) -> list[NDArray[np.uint8]]:
    """Return the images of `opened` in one list."""
    if not isinstance(images, list):
        return [images]
    return [pixels for image in images for pixels in flat(image)]


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open a file, see `read_image`."""
    data = read_image(source)
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        name = "bytes" if isinstance(source, bytes) else str(source)[:80]
        known = ", ".join(FORMATS)
        raise ValueError(f"image {name}: not an image of a known format ({known})") from error


def token_grid(connector: dict[str, Any]) -> OutputGrid:
    """Return what a connector, of this `name` and options, makes of the grid of a view."""
    return partial(CONNECTORS[connector["name"]].output_grid, connector)


def image_layout(geometry: Geometry, connector: dict[str, Any], height: int, width: int) -> Layout:
    """Return the views and the visual tokens of an image of this size in pixels."""
    return geometry.layout(height, width, token_grid(connector))


def rows_of(counts: Sequence[int], images: Sequence[int]) -> Tensor:
    """Return the rows of these images, of which each has as many as `counts` says."""
    spans = list(pairwise([0, *accumulate(counts)]))
    return torch.cat([torch.arange(*spans[image]) for image in images])
