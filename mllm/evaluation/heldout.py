"""The held-out examples of the quick start: images whose captions no stage has seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image as Pillow

from data_packing.captions import normalised
from data_packing.document import DocumentError, Image

__all__ = ["HeldOut", "blank_image", "by_caption", "read_heldout"]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out image and what is true of it.

    Attributes:
        key: the example's name.
        source: the data set it comes from ("stamps", "furniture", …).
        image: the encoded image.
        caption: the text a person wrote about it.
        category: the furniture category, or None where the source has none.
    """

    key: str
    source: str
    image: Image
    caption: str
    category: str | None = None


def read_heldout(path: str | Path) -> list[HeldOut]:
    """Read `captions.json`: a list of {key, source, image, caption, category}.

    Image paths are relative to the file's folder.

    Raises:
        ValueError: the file is missing or is not such a list, or an image cannot be read; the
            message names the record.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: no held-out examples here ({error.strerror}). Prepare the data first: "
            "scripts/quickstart.sh does it."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of examples, found {type(records).__name__}")
    return [_example(path, number, record) for number, record in enumerate(records)]


def _example(path: Path, number: int, record: Any) -> HeldOut:
    where = f"{path}, record {number + 1}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
    missing = [name for name in ("key", "source", "image", "caption") if name not in record]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    try:
        image = Image.open(path.parent / record["image"])
    except DocumentError as error:
        raise ValueError(f"{where}: {error}") from error
    return HeldOut(
        str(record["key"]), record["source"], image, record["caption"], record.get("category")
    )


@cache
def blank_image(side: int = 224) -> Image:
    """A white square: what the model sees when it is shown nothing."""
    file = BytesIO()
    Pillow.new("RGB", (side, side), "white").save(file, "PNG")
    return Image(file.getvalue(), side, side)


def by_caption(examples: Sequence[HeldOut]) -> list[list[int]]:
    """Indices of the examples grouped by caption, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(normalised(example.caption), []).append(number)
    return list(groups.values())
