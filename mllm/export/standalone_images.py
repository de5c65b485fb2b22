"""What the image processors of an exported folder share, whatever the encoder sees of an image.

See `standalone`, with which this becomes one file.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_transforms import to_pil_image

from data_packing.images import FORMATS, to_rgb
from mllm.models.connectors import CONNECTORS
from mllm.models.geometry import Geometry, Layout, OutputGrid


def open_image(source: str) -> Image.Image:
    """Open a path, a URL or base64 (`data:image/png;base64,...`)."""
    if source.startswith(("http://", "https://")):
        with urlopen(source) as answer:
            data = answer.read()
    elif source.startswith("data:"):
        data = base64.b64decode(source.partition(",")[2])
    else:
        data = Path(source).read_bytes()
    return Image.open(io.BytesIO(data), formats=FORMATS)


def pixels_of(image: Any) -> NDArray[np.uint8]:
    """Return a Pillow image, array or tensor as uint8 [H, W, 3], upright, on white."""
    if not isinstance(image, Image.Image):
        image = to_pil_image(image)
    return np.array(to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)


def opened(images: Any) -> Any:
    """Open paths, URLs and base64, in lists too; leave what is an image already."""
    if isinstance(images, list | tuple):
        return [opened(image) for image in images]
    return open_image(images) if isinstance(images, str) else images


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
