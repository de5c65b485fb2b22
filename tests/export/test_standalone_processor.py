"""The exported image processor makes the pixels that the model was trained on."""

from __future__ import annotations

import base64
import io
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_packing.images import decode
from mllm.export.standalone_square import MllmImageProcessor
from mllm.models.geometry import ImageGeometry
from mllm.models.tiles import tiled

SHAPES: dict[str, dict[str, Any]] = {
    "squash": {"resize": "squash", "resampling": "lanczos"},
    "crop": {"resize": "crop", "short_edge": 36},
    "pad": {"resize": "pad", "resampling": "bilinear"},
}
TILINGS: list[dict[str, Any]] = [
    {},
    {"tiling": "dynamic", "tiles": 6},
    {"tiling": "any_resolution"},
    {"tiling": "split", "longest_edge": 96},
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def square(shape: str) -> ImageGeometry:
    colours = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    return ImageGeometry(image_size=32, cells=4, **colours, **SHAPES[shape])


def random_image(mode: str = "RGB", height: int = 45, width: int = 70) -> Image.Image:
    random = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def expected(data: bytes, geometry: ImageGeometry, images: dict[str, Any]) -> torch.Tensor:
    views = torch.from_numpy(np.stack(tiled(geometry, images).views(decode(data))))
    normal = (views.float() / 255 - torch.tensor(geometry.mean)) / torch.tensor(geometry.std)
    return normal.permute(0, 3, 1, 2)


def found(image: Any, geometry: ImageGeometry, images: dict[str, Any]) -> torch.Tensor:
    processor = MllmImageProcessor(geometry=geometry.to_dict(), images=images)
    pixels: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("images", TILINGS, ids=lambda images: images.get("tiling", "one"))
@pytest.mark.parametrize("size", [(45, 70), (32, 32), (1, 1), (3, 300), (200, 31)])
def test_pixels_are_those_of_training(
    shape: str, images: dict[str, Any], size: tuple[int, int]
) -> None:
    data = encoded(random_image("RGB", *size))
    geometry = square(shape)
    assert torch.equal(
        found(Image.open(io.BytesIO(data)), geometry, images), expected(data, geometry, images)
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16", "CMYK"])
def test_every_mode_becomes_the_same_rgb(mode: str) -> None:
    data = encoded(random_image(mode), "TIFF" if mode == "CMYK" else "PNG")
    geometry = square("squash")
    assert torch.equal(
        found(Image.open(io.BytesIO(data)), geometry, {}), expected(data, geometry, {})
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(random_image(), "PNG", exif=exif)
    geometry = square("pad")
    assert torch.equal(
        found(Image.open(io.BytesIO(data)), geometry, {}), expected(data, geometry, {})
    )


def test_images_come_as_transformers_users_hand_them_over(tmp_path: Path) -> None:
    image, geometry = random_image(), square("crop")
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    array = np.array(image)
    wanted = expected(data, geometry, {})
    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    forms = [
        str(tmp_path / "a.png"),
        f"http://127.0.0.1:{server.server_port}/a.png",
        "data:image/png;base64," + base64.b64encode(data).decode(),
        image,
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.transpose(2, 0, 1).copy()),
    ]
    for form in forms:
        assert torch.equal(found(form, geometry, {}), wanted)
    together = found([[forms[0]], [forms[3], forms[4]]], geometry, {})
    server.shutdown()
    assert torch.equal(together, wanted.expand(3, -1, -1, -1))
