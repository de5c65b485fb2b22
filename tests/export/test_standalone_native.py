"""The exported image processor for encoders of native resolution: pixels, grids, tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm.export import standalone_native, standalone_square
from mllm.export.standalone_images import image_layout
from mllm.export.standalone_native import MllmImageProcessor, image_layouts
from mllm.models.geometry import ImageGeometry
from mllm.models.native import NativeGeometry

COLOURS: dict[str, Any] = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
RULES: dict[str, NativeGeometry] = {
    "pixels": NativeGeometry(4, 2, **COLOURS, min_pixels=512, max_pixels=8000),
    "few pixels": NativeGeometry(4, 2, **COLOURS, max_pixels=640),
    "equal pixels": NativeGeometry(4, 2, **COLOURS, min_pixels=16000, max_pixels=16000),
    "nearly equal": NativeGeometry(16, 2, **COLOURS, min_pixels=190000, max_pixels=200000),
    "patches": NativeGeometry(4, 1, **COLOURS, max_patches=60, resampling="bilinear"),
    "blocks": NativeGeometry(4, 2, **COLOURS, max_patches=90),
}
CONNECTORS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp"},
    "pixel_shuffle": {"name": "pixel_shuffle", "factor": 2},
    "patch_merger": {"name": "patch_merger", "factor": 3},
}
sides = st.integers(1, 90) | st.integers(1, 3000)


def processor(rule: str, connector: str = "mlp") -> MllmImageProcessor:
    return MllmImageProcessor(RULES[rule].to_dict(), connector=CONNECTORS[connector])


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("rule", RULES)
def test_patches_put_together_are_the_view_of_training(rule: str) -> None:
    images = pictures((45, 70), (8, 8), (1, 1), (3, 300), (200, 31), (64, 40))
    geometry = RULES[rule]
    found = processor(rule)(images, return_tensors="pt")
    counts = found["image_grid_thw"].prod(-1).tolist()
    assert len(set(counts)) > 1
    pieces = found["pixel_values"].split(counts)
    for image, piece, (one, rows, columns) in zip(
        images, pieces, found["image_grid_thw"].tolist(), strict=True
    ):
        view = torch.from_numpy(geometry.views(np.array(image))[0]).float() / 255
        expected = (view - torch.tensor(geometry.mean)) / torch.tensor(geometry.std)
        lines = [
            torch.cat([patch.view(geometry.patch, geometry.patch, 3) for patch in line], dim=1)
            for line in piece.split(columns)
        ]
        assert (one, rows) == (1, len(lines))
        assert torch.equal(torch.cat(lines), expected)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides)
@example(height=4, width=800)
@example(height=1, width=185)
@example(height=3, width=1000)
@example(height=1000, width=3)
def test_an_image_of_any_size_is_counted_as_it_is_and_none_takes_more_than_the_size(
    rule: str, connector: str, height: int, width: int
) -> None:
    made, geometry = processor(rule, connector), RULES[rule]
    counted = image_layout(geometry, made.connector, height, width)
    rows, columns = geometry.grid(*geometry.size(height, width))
    (layout,) = image_layouts(geometry, made.connector, [(1, rows, columns)])
    assert layout == counted
    size = made.size
    most = image_layout(geometry, made.connector, size["height"], size["width"])
    assert counted.tokens <= most.tokens


def test_images_come_as_for_other_encoders() -> None:
    (image,) = pictures((45, 70))
    array = np.array(image)
    wanted = processor("pixels")(image, return_tensors="pt")["pixel_values"]
    for form in (array, torch.from_numpy(array.transpose(2, 0, 1).copy()), [[image]]):
        found = processor("pixels")(form, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, wanted)


ORDERS = [[2, 0], [1, 2, 1, 2, 0], [0, 1, 2]]
THREE = pictures((45, 70), (8, 8), (64, 40))


@pytest.mark.parametrize("images", ORDERS)
def test_images_are_picked_in_the_order_asked_for(images: list[int]) -> None:
    """Rows of beams repeat an image: what is picked is what those images alone become."""
    made = processor("pixels")
    grids = made(THREE, return_tensors="pt")
    layouts = image_layouts(RULES["pixels"], made.connector, grids["image_grid_thw"].tolist())
    found = standalone_native.pick_images(*grids.values(), layouts, images)
    wanted = made([THREE[image] for image in images], return_tensors="pt")
    for one, other in zip(found, wanted.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("images", ORDERS)
def test_tiles_are_picked_in_the_order_asked_for(images: list[int]) -> None:
    square = ImageGeometry(32, 4, **COLOURS)
    made = standalone_square.MllmImageProcessor(
        square.to_dict(), {"tiling": "dynamic", "tiles": 6}, CONNECTORS["mlp"]
    )
    rule = standalone_square.image_geometry(made.geometry, made.images)
    views = made(THREE, return_tensors="pt")
    layouts = standalone_square.image_layouts(rule, made.connector, views["original_sizes"])
    assert len({len(layout.sizes) for layout in layouts}) > 1
    found = standalone_square.pick_images(*views.values(), layouts, images)
    wanted = made([THREE[image] for image in images], return_tensors="pt")
    for one, other in zip(found, wanted.values(), strict=True):
        assert torch.equal(one, other)
