from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from packing_toys import encoded, png
from PIL import Image as PillowImage

from data_packing import images
from data_packing.document import Image
from data_packing.images import DocumentError, decode, decode_all, size

GRADIENT = np.stack(
    np.broadcast_arrays(
        np.arange(24, dtype=np.uint8)[:, None] * 10, np.arange(16, dtype=np.uint8) * 15, 128
    ),
    axis=-1,
).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_every_format_gives_its_size_and_its_pixels(kind: str) -> None:
    data = encoded(PillowImage.fromarray(GRADIENT), kind)
    assert size(data) == (24, 16)
    assert images.kind(data) == kind
    pixels = decode(data)
    assert pixels.shape == (24, 16, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - GRADIENT).mean() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_size_and_pixels(kind: str, orientation: int) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    data = encoded(PillowImage.fromarray(GRADIENT), kind, exif=exif, **options)
    right = {
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2),
        6: np.rot90(GRADIENT, -1),
        7: GRADIENT[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(GRADIENT),
    }[orientation]
    assert size(data) == right.shape[:2]
    pixels = decode(data)
    assert pixels.shape == right.shape
    assert np.abs(pixels.astype(int) - right).mean() < 3


def test_transparency_is_laid_over_white() -> None:
    clear = PillowImage.new("RGBA", (3, 2), (255, 0, 0, 0))
    assert (decode(encoded(clear, "PNG")) == 255).all()
    half = PillowImage.new("RGBA", (3, 2), (0, 0, 0, 128))
    assert decode(encoded(half, "PNG"))[0, 0].tolist() == [127] * 3
    palette = PillowImage.new("P", (3, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (decode(encoded(palette, "PNG", transparency=0)) == 255).all()
    assert decode(encoded(palette, "PNG"))[0, 0].tolist() == [255, 0, 0]


def test_grey_cmyk_and_sixteen_bit_become_rgb() -> None:
    deep = PillowImage.fromarray(np.full((2, 3), 0x80FF, dtype=np.uint16))
    assert decode(encoded(deep, "PNG"))[0, 0].tolist() == [0x80] * 3
    assert decode(encoded(PillowImage.new("L", (3, 2), 7), "PNG"))[0, 0].tolist() == [7] * 3
    assert decode(encoded(PillowImage.new("1", (3, 2), 1), "PNG"))[0, 0].tolist() == [255] * 3
    cmyk = PillowImage.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode(encoded(cmyk, "JPEG", quality=100))[4, 4]
    assert red[0] > 200
    assert red[1:].max() < 60


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [PillowImage.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_floating_point_pixels_are_refused() -> None:
    data = encoded(PillowImage.new("F", (2, 2), 0.5), "TIFF")
    with pytest.raises(DocumentError, match="floating-point"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_truncated_file_is_refused_with_a_reason(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(PillowImage.fromarray(noise), kind)
    with pytest.raises(DocumentError, match="truncated|broken"):
        decode(data[: len(data) // 2])


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DocumentError, match="empty image file"):
        size(b"")
    with pytest.raises(DocumentError, match="not an image of a known format"):
        size(b"<html>not found</html>")
    with pytest.raises(DocumentError, match="not an image of a known format"):
        size(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [9_000, 12_000, 100_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    for function in (size, decode):
        with pytest.raises(DocumentError, match="limit of"):
            function(bomb(side, side))


def test_the_pixel_limit_is_the_callers() -> None:
    with pytest.raises(DocumentError, match="72 pixels, above the limit of 71"):
        decode(png(8, 9), max_pixels=71)
    assert decode(png(8, 9), max_pixels=72).shape == (8, 9, 3)


def test_decode_all_names_the_image_and_checks_the_promised_size() -> None:
    good = Image.from_bytes(png())
    broken = Image(png()[:60], 8, 9)
    with pytest.raises(DocumentError, match=r"^image 2: "):
        decode_all([good, broken])
    with pytest.raises(DocumentError, match="image 1: decoded to 8x9 .* says 9x9"):
        decode_all([Image(png(), 9, 9)])


def test_pixels_are_writable_and_own_their_memory() -> None:
    for kind in ("PNG", "JPEG"):
        pixels = decode(encoded(PillowImage.fromarray(GRADIENT), kind))
        pixels[0] = 0
        assert pixels.flags.owndata or pixels.base.flags.writeable


def test_broken_metadata_does_not_lose_the_image() -> None:
    data = encoded(PillowImage.fromarray(GRADIENT), "JPEG", exif=b"Exif\x00\x00rubbish")
    assert decode(data).shape == (24, 16, 3)
    assert PillowImage.open(io.BytesIO(data)).format == "JPEG"
