"""What transformers' users hand over, as our own nouns: messages, and images of many kinds."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from data_packing.document import Document, DocumentError, Image, Part, Text

_FIELDS = ("image", "path", "url", "base64")


def is_batch(conversation: Any) -> bool:
    """Return whether it is a list of conversations, not one."""
    return bool(conversation) and not isinstance(conversation[0], Mapping)


def document_of(messages: Iterable[Mapping[str, Any]]) -> Document:
    """Return a conversation's messages as a document.

    Args:
        messages: `role` and `content`; the content is a text, or a list of parts as transformers'
            processors take it: `{"type": "text", "text": …}` and `{"type": "image", …}` with the
            image under `image`, `path`, `url` or `base64`.

    Raises:
        ValueError: a part of another kind, or an image that is missing or cannot be read.
    """
    turns = [(message["role"], _parts(message["content"])) for message in messages]
    return Document.conversation(turns)


def image_of(value: Any) -> Image:
    """Return an image from a Pillow image, an array, a path, bytes, a data URL, or our own.

    Args:
        value: an array is uint8, [H, W, 3] or [H, W]. Addresses of the network are not fetched:
            what is not on this machine is the caller's to get.

    Raises:
        ValueError: nothing that can be read as an image.
    """
    if isinstance(value, Image):
        return value
    if isinstance(value, bytes):
        return Image.from_bytes(value)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise ValueError(
                f"an image as an array is uint8 [H, W, 3], got {value.dtype} {list(value.shape)}"
            )
        value = PillowImage.fromarray(value)
    if isinstance(value, PillowImage.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG", exif=value.getexif())
        return Image.from_bytes(buffer.getvalue())
    if isinstance(value, str | Path):
        return _from_text(str(value))
    raise ValueError(f"an image cannot be read from {type(value).__name__}")


def images_per_text(images: Any, counts: Sequence[int]) -> list[list[Image]]:
    """Deal images to texts, which hold so many placeholders each.

    Args:
        images: None, one, a list, or a list of lists, one for each text.

    Raises:
        ValueError: more or fewer images than placeholders.
    """
    if images is None:
        images = []
    elif not isinstance(images, list | tuple):
        images = [images]
    if images and isinstance(images[0], list | tuple):
        nested = [[image_of(one) for one in row] for row in images]
        if [*map(len, nested)] != [*counts]:
            raise ValueError(
                f"the texts hold {[*counts]} images, but {[*map(len, nested)]} are given"
            )
        return nested
    if len(images) != sum(counts):
        raise ValueError(f"the texts hold {sum(counts)} images, but {len(images)} are given")
    flat = iter([image_of(one) for one in images])
    return [[next(flat) for _ in range(count)] for count in counts]


def _parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)]
    parts: list[Part] = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            parts.append(Text(part["text"]))
        elif kind == "image":
            given = [name for name in _FIELDS if part.get(name) is not None]
            if not given:
                raise ValueError(f"an image of a message has none of {', '.join(_FIELDS)}")
            value = part[given[0]]
            parts.append(_decoded(value) if given[0] == "base64" else image_of(value))
        else:
            raise ValueError(f"a part of a message is text or image, not {kind!r}")
    return parts


def _from_text(text: str) -> Image:
    if text.startswith("data:"):
        return _decoded(text.partition(",")[2])
    if text.startswith(("http://", "https://")):
        raise ValueError(f"{text} is not fetched: download it and give the path, or the image")
    return Image.open(text.removeprefix("file://"))


def _decoded(text: str) -> Image:
    try:
        return Image.from_bytes(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise DocumentError(f"an image is not valid base64: {error}") from error
