"""Every kind of image is taken here and by an exported processor, with the same pixels."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
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
from mllm.models.messages import image_of
from mllm.models.pictures import pixels_of

HEIGHT, WIDTH = 45, 70
GEOMETRY = ImageGeometry(32, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "squash")


def photo() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ours(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return decode(image_of(image).data)


def theirs(image: Any) -> torch.Tensor:
    """The view that an exported processor makes, as bytes."""
    processor = MllmImageProcessor(geometry=GEOMETRY.to_dict())
    view: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return (view * 255).round().to(torch.uint8).permute(1, 2, 0)


def check(image: Any, wanted: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    assert np.array_equal(ours(image), wanted)
    assert np.array_equal(theirs(image).numpy(), GEOMETRY.preprocess(wanted))


def palette() -> Image.Image:
    image = photo().quantize(16)
    image.info["transparency"] = 0
    return image


def with_alpha(mode: str) -> Image.Image:
    image = photo().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
    return image


MODES: dict[str, Callable[[], Image.Image]] = {
    **{mode: partial(photo().convert, mode) for mode in ("L", "RGB", "CMYK", "YCbCr", "HSV", "1")},
    "P": lambda: photo().quantize(16),
    "P with transparency": palette,
    "LA": lambda: with_alpha("L"),
    "RGBA": lambda: with_alpha("RGB"),
    "I": lambda: Image.fromarray(np.array(photo().convert("L"), dtype=np.int32) * 256),
    "I;16": lambda: Image.fromarray(np.array(photo().convert("L"), dtype=np.uint16) * 256),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow(mode: str) -> None:
    image = MODES[mode]()
    rgb = image.convert("RGB")
    if mode in ("LA", "RGBA", "P with transparency"):
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image.convert("RGBA").convert("RGB"), mask=image.convert("RGBA").getchannel("A"))
    elif mode.startswith("I"):
        rgb = photo().convert("L").convert("RGB")
    assert np.abs(ours(image).astype(int) - np.array(rgb)).max() <= 1  # of what lies over white
    check(image, ours(image))


def arrays() -> dict[str, Any]:
    rgb = np.array(photo())
    grey = rgb[:, :, 0]
    clear = np.concatenate([rgb, np.full((HEIGHT, WIDTH, 1), 255, dtype=np.uint8)], axis=2)
    return {
        "[H, W, 3]": rgb,
        "[3, H, W]": rgb.transpose(2, 0, 1),
        "[H, W, 4]": clear,
        "[4, H, W]": clear.transpose(2, 0, 1),
        "[H, W]": grey,
        "[H, W, 1]": grey[:, :, None],
        "[1, H, W]": grey[None],
        "int64": rgb.astype(np.int64),
        "float32 to 1": (rgb / 255).astype(np.float32),
        "float64 to 1": rgb / 255,
        "float16 to 1": (rgb / 255).astype(np.float16),
        "float32 to 255": rgb.astype(np.float32),
    }


@pytest.mark.parametrize("name", arrays())
@pytest.mark.parametrize("kind", ["numpy", "torch", "view"])
def test_arrays_and_tensors(name: str, kind: str) -> None:
    array, rgb = arrays()[name], np.array(photo())
    wanted = rgb[:, :, :1].repeat(3, axis=2) if "3" not in name and "W" in name else rgb
    wanted = rgb if "4" in name else wanted
    if kind == "torch":
        array = torch.from_numpy(array.copy())
    elif kind == "view":
        array = np.ascontiguousarray(array[::-1])[::-1]
    check(array, wanted)


@pytest.mark.parametrize("shape", [(3, 5, 3), (3, 5, 4), (4, 1, 3), (3, 3, 3)])
def test_where_both_ends_could_be_channels(shape: tuple[int, int, int]) -> None:
    """They are the last of an array and the first of a tensor."""
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    array[..., 3:] = 255
    check(array, array[..., :3])
    check(torch.from_numpy(np.moveaxis(array, 2, 0).copy()), array[..., :3])


def test_a_tensor_in_bfloat16_on_a_graph() -> None:
    tensor = torch.zeros(3, 4, 5, dtype=torch.bfloat16, requires_grad=True) + 1
    assert pixels_of(tensor / 2).tolist() == np.full((4, 5, 3), 128).tolist()


def test_an_array_of_four_axes_is_several_images() -> None:
    both = np.stack([np.array(photo())] * 2)
    processor = MllmImageProcessor(geometry=GEOMETRY.to_dict())
    assert len(processor(both, return_tensors="pt")["pixel_values"]) == 2


def test_transparency_is_laid_over_white() -> None:
    clear = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    check(clear, np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_files_and_addresses(tmp_path: Path) -> None:
    data, path = encoded(photo()), tmp_path / "a photo.png"
    path.write_bytes(data)
    code = base64.b64encode(data).decode()
    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    forms = [
        *(path, str(path), path.as_uri(), data, code, f"data:image/png;base64,{code}"),
        *(
            "\n".join(code[at : at + 76] for at in range(0, len(code), 76)),
            f"{address}/a%20photo.png",
        ),
    ]
    for form in forms:
        check(form, np.array(photo()))
    for source in (f"{address}/no.png", "http://127.0.0.1:1/a.png", f"{path}.no"):
        refused(source, "image .*: (Not Found|File not found|.*refused|No such file)")
    server.shutdown()


def refused(image: Any, reason: str) -> None:
    for take in (ours, theirs):
        with pytest.raises(ValueError, match=reason) as error:
            take(image)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (3.5, "cannot be read from float"),
        (photo().convert("F"), "floating-point pixels"),
        (photo().convert("LAB"), "LAB"),
        (np.zeros((5, 6, 2)), r"this one is \[5, 6, 2\]"),
        (np.zeros(4), r"this one is \[4\]"),
        (np.zeros((0, 5, 3)), r"this one is \[0, 5, 3\]"),
        (np.full((4, 5, 3), 256), "not int64 from 256 to 256"),
        (np.full((4, 5, 3), -0.5), "not float64 from -0.5"),
        (np.full((4, 5, 3), np.nan), "not float64 from nan"),
        (np.zeros((4, 5, 3), dtype=complex), "not complex128"),
        ("nowhere.png", "image nowhere.png: No such file"),
        ("nowhere1", "image nowhere1: No such file"),
        ("фото.png", "image фото.png: No such file"),
        ("data:image/png;base64,?", "not valid base64"),
        ("data:image/png;base64,AAAA", "not an image of a known format"),
        (b"GIF", "not an image of a known format"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(image: Any, reason: str) -> None:
    refused(image, reason)


JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "quality 30": {"quality": 30},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "turned": {"orientation": 6},
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("size", [(45, 70), (1, 1), (3, 17), (33, 31)])
def test_jpegs_are_the_same_with_either_decoder(name: str, size: tuple[int, int]) -> None:
    how = {"mode": "RGB", **JPEGS[name]}
    exif = Image.Exif()
    exif[0x0112] = how.pop("orientation", 1)
    image = photo().resize(size[::-1]).convert(how.pop("mode"))
    data = encoded(image, "JPEG", exif=exif, **how)
    check(data, ours(data))
    check(Image.open(io.BytesIO(data)), ours(data))


def test_four_colours_are_mixed_as_they_are_defined() -> None:
    """(255 - C) (255 - K) / 255, rounded; simplejpeg is up to 2 below."""
    data = encoded(photo().convert("CMYK"), "JPEG", quality=100)
    inks = np.array(Image.open(io.BytesIO(data)), dtype=float)
    exact = (255 - inks[:, :, :3]) * (255 - inks[:, :, 3:]) / 255
    assert np.abs(decode(data) - exact).max() <= 0.5
