"""Tiles beside the image processors of transformers: the same views to the last pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mllm.models.geometry import ImageGeometry
from mllm.models.tiles import tiled
from mllm.models.tiles.any_resolution import _without_padding

SIDE = 16
HALF = (0.5, 0.5, 0.5)
STRIPS = [(1, 1), (1, 50), (50, 1), (3, 500), (500, 3), (1, 5000), (4096, 3), (1500, 2000)]
RAW = {"do_normalize": False, "do_rescale": False, "return_tensors": "np"}


def sizes(count: int = 60) -> list[tuple[int, int]]:
    """Strips, whole tiles, sizes around which larger grids of one aspect begin, and random ones."""
    random = np.random.default_rng(0).integers(1, 300, (count, 2)).tolist()
    whole = [(SIDE * rows, SIDE * columns) for rows in (1, 2, 3) for columns in (1, 2, 7)]
    growing = [size for side in range(20, 50, 3) for size in ((side, side), (side, 2 * side))]
    return [*STRIPS, *whole, *growing, *((high, wide) for high, wide in random)]


def picture_of(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * 7919 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )


def square(resampling: str) -> ImageGeometry:
    return ImageGeometry(SIDE, 4, HALF, HALF, resampling=resampling)


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (1, 6), (2, 4), (1, 1)])
def test_dynamic_tiles_are_internvls(fewest: int, most: int) -> None:
    own = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_to_patches=True,
        min_patches=fewest,
        max_patches=most,
        resample=3,
    )
    spec = {"tiling": "dynamic", "tiles": most, "min_tiles": fewest}
    tiles: Any = tiled(square("bicubic"), spec)
    for high, wide in sizes():
        pixels = picture_of(high, wide)
        found = own(Image.fromarray(pixels), **RAW)
        views = np.stack(tiles.views(pixels)).transpose(0, 3, 1, 2)
        assert found["num_patches"].tolist() == [tiles.count(high, wide)], (high, wide)
        assert np.array_equal(views, found["pixel_values"]), (high, wide)


@pytest.mark.parametrize("kind", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize(("longest", "splits"), [(64, True), (96, True), (40, True), (64, False)])
def test_split_tiles_are_those_of_idefics3(kind: Any, longest: int, splits: bool) -> None:
    own = kind(
        size={"longest_edge": longest},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=splits,
        return_row_col_info=True,
        resample=1,
    )
    spec = {"tiling": "split", "longest_edge": longest, "whole_only": not splits}
    tiles: Any = tiled(square("lanczos"), spec)
    for high, wide in sizes(20):
        pixels = picture_of(high, wide)
        found = own(Image.fromarray(pixels), **RAW)
        views = np.stack(tiles.views(pixels)).transpose(0, 3, 1, 2)
        assert (found["rows"][0][0], found["cols"][0][0]) == tiles.tile_grid(high, wide)
        assert len(views) == tiles.count(high, wide)
        assert np.array_equal(views, found["pixel_values"][0]), (high, wide)


@pytest.mark.parametrize("grid", [(8, 8), (4, 8), (12, 4), (5, 5), (27, 54)])
def test_padding_is_left_out_as_llava_next_does(grid: tuple[int, int]) -> None:
    """Among the sizes are those whose scaled side is a hair below a whole number of cells."""
    cells = np.arange(grid[0] * grid[1]).reshape(grid)
    hairs = [(196, 49), (49, 196), (98, 245), (245, 98), (49, 49), (99, 55)]
    for high, wide in [*hairs, *sizes()]:
        own = unpad_image(torch.from_numpy(cells)[None], (high, wide))[0]
        assert np.array_equal(_without_padding(cells, high, wide), own.numpy()), (high, wide)
