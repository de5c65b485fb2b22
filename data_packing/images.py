"""Encoded image files to pixels, and to their size without decoding them.

JPEG goes through simplejpeg, everything else through Pillow. So do JPEGs of four colours (CMYK,
YCCK), whose mixture simplejpeg cuts off where Pillow rounds, and any that simplejpeg does not take.
Only the formats named in FORMATS are opened: Pillow also knows some that run other programs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data_packing.document import Image

MAX_PIXELS = 64 * 1024 * 1024
"""Height times width above which an image is refused; the caller may set another limit (up to
Pillow's own, about 178 million)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ORIENTATION = 0x0112
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_TRANSPOSE = {
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_270,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_90,
}


class DocumentError(ValueError):
    """A document that cannot be used; the message is the reason, written for a person."""


class TooManyPixels(DocumentError):
    """An image above the limit of pixels; nothing of it was decoded."""


def size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (height, width) as a person sees the image (after EXIF rotation), from its header.

    Raises:
        DocumentError: not an image of a known format, an empty file, or more than `max_pixels`.
    """
    with _opened(data, max_pixels) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _ROTATED else (height, width)


def kind(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """Return the name of an image's format (JPEG, PNG, …), from its header.

    Raises:
        DocumentError: as `size`.
    """
    with _opened(data, max_pixels) as image:
        return str(image.format)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the pixels of an encoded image, uint8 [H, W, 3] RGB.

    EXIF rotation is applied, transparency is laid over white, palettes, CMYK, grey and 16-bit
    images become 8-bit RGB, and of an animation the first frame is taken.

    Raises:
        DocumentError: the file is broken, truncated, of an unknown format, or too large.
    """
    with _opened(data, max_pixels) as image:
        orientation = _orientation(image)
        fast = image.format in ("JPEG", "MPO") and image.mode != "CMYK"
        pixels = _decode_jpeg(data) if fast else None
        if pixels is None:
            try:
                return rgb_pixels(image)
            except (
                OSError,
                SyntaxError,
                ValueError,
                IndexError,
                EOFError,
                MemoryError,
            ) as error:
                raise DocumentError(_reason(image.format, error)) from error
    if orientation == 1:
        return pixels
    return np.array(_upright(PillowImage.fromarray(pixels), orientation), dtype=np.uint8)


def decode_all(images: Sequence[Image], max_pixels: int = MAX_PIXELS) -> list[NDArray[np.uint8]]:
    """Decode the images of a document in order; each must have the size its header promised.

    Raises:
        DocumentError: as `decode`, with the number of the image (from 1) in front.
    """
    pixels = []
    for number, image in enumerate(images, start=1):
        try:
            decoded = decode(image.data, max_pixels)
        except DocumentError as error:
            raise DocumentError(f"image {number}: {error}") from error
        if decoded.shape[:2] != (image.height, image.width):
            raise DocumentError(
                f"image {number}: decoded to {decoded.shape[0]}x{decoded.shape[1]} (height x "
                f"width), its index says {image.height}x{image.width}"
            )
        pixels.append(decoded)
    return pixels


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[PillowImage.Image]:
    if not data:
        raise DocumentError("empty image file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below, with a reason
            image = PillowImage.open(io.BytesIO(data), formats=FORMATS)
    except PillowImage.DecompressionBombError as error:
        raise TooManyPixels(
            f"it claims to be far above the limit of {max_pixels:,} pixels"
        ) from error
    except UnidentifiedImageError as error:
        start = data[:8].hex(" ")
        raise DocumentError(
            f"not an image of a known format ({len(data):,} bytes, starting {start}); "
            f"known: {', '.join(FORMATS)}"
        ) from error
    except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:
        raise DocumentError(_reason("image", error)) from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise TooManyPixels(
            f"{height:,}x{width:,} is {height * width:,} pixels, above the limit of {max_pixels:,}"
        )
    if width < 1 or height < 1:
        raise DocumentError(f"an image of {height}x{width} has no pixels")
    with image:
        yield image


def _orientation(image: PillowImage.Image) -> int:
    # For a PNG whose EXIF comes after its pixels, getexif() would decode everything: leave it.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata of any kind must not lose a good image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: PillowImage.Image, orientation: int) -> PillowImage.Image:
    return image if orientation == 1 else image.transpose(_TRANSPOSE[orientation])


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Decode with simplejpeg, or return None where Pillow should try (and name the fault)."""
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def rgb_pixels(image: PillowImage.Image) -> NDArray[np.uint8]:
    """Return a Pillow image of any mode as uint8 [H, W, 3]: upright, transparency over white.

    Raises:
        ValueError: as `to_rgb`.
    """
    orientation = _orientation(image)  # before pixels are loaded, as for a file
    return np.array(_upright(to_rgb(image), orientation), dtype=np.uint8)


def to_rgb(image: PillowImage.Image) -> PillowImage.Image:
    """Return an image of any mode as 8-bit RGB, transparency laid over white.

    Raises:
        ValueError: floating-point pixels, or the mode LAB.
    """
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return PillowImage.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save the image as 8-bit")
    if image.mode == "LAB":
        raise ValueError("Pillow does not turn LAB into RGB by itself; save the image as RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = PillowImage.new("RGBA", coloured.size, (255, 255, 255, 255))
        return PillowImage.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _reason(kind: Any, error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    word = "truncated" if "truncated" in text.lower() or isinstance(error, EOFError) else "broken"
    return f"{word} {kind}: {text}"
