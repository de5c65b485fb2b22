"""Images as people hand them over: files, addresses, Pillow images, arrays and tensors.

The exported image processors have these functions too, so both take the same kinds of images and
make the same pixels of them.
"""

from __future__ import annotations

import base64
import binascii
import io
from http.client import HTTPException
from os.path import isfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError
from torch import Tensor

from data_packing.images import FORMATS, rgb_pixels

_CHANNELS = (1, 3, 4)  # grey, RGB, RGB with transparency
_SECONDS = 60  # without an answer from an address
_SHOWN = 80  # characters of what was asked for, in a message


def read_image(source: str | Path | bytes) -> bytes:
    """Return the bytes of an image's file.

    Args:
        source: a path, an address (`http://`, `https://`, `file://`, `data:…;base64,`), base64, or
            the bytes themselves.

    Raises:
        ValueError: nothing is there, in one line.
    """
    if isinstance(source, bytes):
        return source
    text, shown = str(source), f"image {str(source)[:_SHOWN]}"
    try:
        if text.startswith(("http://", "https://")):
            with urlopen(text, timeout=_SECONDS) as answer:
                data: bytes = answer.read()
            return data
        if text.startswith("data:"):
            return bytes_of_base64(text.partition(",")[2])
        if text.startswith("file://"):
            text = url2pathname(urlsplit(text).path)
        elif isinstance(source, str) and not isfile(text):
            coded = bytes_of_base64(text) if len(text) % 4 == 0 or "\n" in text else b""
            if is_image(coded):
                return coded
        return Path(text).read_bytes()
    except binascii.Error as error:
        if not text.startswith("data:"):
            raise ValueError(f"{shown}: No such file or directory") from error
        raise ValueError(f"{shown}: not valid base64: {error}") from error
    except OSError as error:
        reason = getattr(error, "reason", None)  # of an address
        raise ValueError(f"{shown}: {reason or error.strerror or error}") from error
    except (HTTPException, ValueError) as error:
        raise ValueError(f"{shown}: {error}") from error


def bytes_of_base64(text: str) -> bytes:
    """Return what base64 stands for; white space in it counts for nothing.

    Raises:
        binascii.Error: it is none.
    """
    return base64.b64decode("".join(text.split()).encode(), validate=True)


def is_image(data: bytes) -> bool:
    """Return whether bytes begin as an image file of a known format does."""
    try:
        PillowImage.open(io.BytesIO(data), formats=FORMATS).close()
    except (OSError, SyntaxError, ValueError, PillowImage.DecompressionBombError) as error:
        return not isinstance(error, UnidentifiedImageError)
    return True


def pixels_of(image: Any) -> NDArray[np.uint8]:
    """Return a Pillow image, an array or a tensor as uint8 [H, W, 3], upright, on white.

    An array is [H, W] or has 1, 3 or 4 channels (grey, RGB, RGB with transparency): last, or where
    that is no such number, first; of a tensor of torch first, or else last. Whole numbers go from 0
    to 255. Others go from 0 to 1, as transformers takes them, and are rounded.

    Raises:
        ValueError: nothing of these, another shape or other numbers, or a mode of Pillow that has
            no RGB (F, LAB).
    """
    if not isinstance(image, PillowImage.Image):
        if isinstance(image, Tensor):
            tensor = image.detach().cpu()
            array, axes = (tensor.float() if tensor.is_floating_point() else tensor).numpy(), (0, 2)
        elif hasattr(image, "__array__"):
            array, axes = np.asarray(image), (2, 0)
        else:
            raise ValueError(f"an image cannot be read from {type(image).__name__}")
        image = PillowImage.fromarray(eight_bits(channels_last(array, axes)))
    return rgb_pixels(image)


def channels_last(array: NDArray[Any], axes: tuple[int, int]) -> NDArray[Any]:
    """Return an array as [H, W] or [H, W, 3 or 4].

    Args:
        array: of an image.
        axes: where channels may be, likeliest first.

    Raises:
        ValueError: another shape.
    """
    if array.ndim == 2 and array.size:
        return array
    for axis in axes if array.ndim == 3 and array.size else ():
        if array.shape[axis] in _CHANNELS:
            moved = np.moveaxis(array, axis, 2)
            return moved[:, :, 0] if moved.shape[2] == 1 else moved
    raise ValueError(
        f"an image as an array is [H, W], or has 1, 3 or 4 channels: [H, W, 3] or [3, H, W]; this "
        f"one is {list(array.shape)}"
    )


def eight_bits(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return numbers as 8 bits; see `pixels_of`.

    Raises:
        ValueError: numbers that are none of an image's.
    """
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind in "iuf":
        low, high = array.min(), array.max()
        whole = array.dtype.kind != "f" or bool((array == np.rint(array)).all())
        if low >= 0 and high <= (255 if whole else 1):
            exact = array.astype(np.float64) * (1 if whole else 255)
            return np.rint(exact).astype(np.uint8)
        numbers = f"{array.dtype} from {low:.6g} to {high:.6g}"
    else:
        numbers = str(array.dtype)
    raise ValueError(
        f"an image as an array holds whole numbers from 0 to 255, or others from 0 to 1, not "
        f"{numbers}"
    )
