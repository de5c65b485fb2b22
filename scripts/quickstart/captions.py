"""Captioned pictures and the split by caption: one rule for every source and every stage.

A picture is held out if the hash of its normalised caption says so. The same caption occurs in
several sources and on several pictures; a split by picture would leak it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from data_packing.captions import normalised

__all__ = [
    "HELD_OUT_SHARE",
    "Picture",
    "held_out",
    "kept",
    "read_pictures",
    "shrunk",
    "write_pictures",
]

HELD_OUT_SHARE = 0.12
MAX_SIDE = 512
"""Longer sides are scaled down to this: the encoder sees 224, and shards stay small."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, what it shows and what else is known about it.

    Attributes:
        key: unique in its source; also the stem of its file.
        source: the data set's name.
        caption: in English.
        file: name of the image file in the folder of its split.
        category: one of the furniture catalogue's twelve, or None.
        group: the stamp collection's own folder ("animals"), or None.
        names: the caption in other languages, by language code (fr, de, es).
        width_cm, depth_cm, height_cm: true size, where known.
        creator, licence: whom to name, where it is known for this one picture.
        held_out: never shown in training.
    """

    key: str
    source: str
    caption: str
    file: str
    category: str | None = None
    group: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    width_cm: float | None = None
    depth_cm: float | None = None
    height_cm: float | None = None
    creator: str | None = None
    licence: str | None = None
    held_out: bool = False


def held_out(caption: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether pictures with this caption are kept away from training."""
    return _unit("caption", normalised(caption)) < share


def kept(key: str, fraction: float) -> bool:
    """Whether a smaller run keeps this item (by hash: a larger fraction contains a smaller)."""
    return fraction >= 1.0 or _unit("fraction", key) < fraction


def _unit(purpose: str, text: str) -> float:
    digest = hashlib.sha256(f"{purpose}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def shrunk(data: bytes, max_side: int = MAX_SIDE) -> bytes:
    """The image as it is if it is small enough, else scaled down, as PNG."""
    with Image.open(io.BytesIO(data)) as opened:
        if max(opened.size) <= max_side and opened.format in ("PNG", "JPEG"):
            return data
        image = opened.convert("RGBA" if opened.mode in ("P", "LA", "PA", "RGBA") else "RGB")
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        output = io.BytesIO()
        image.save(output, "PNG")
        return output.getvalue()


def write_pictures(folder: Path, found: Iterable[tuple[Picture, bytes]]) -> list[Picture]:
    """Write captions/ (training, with sidecars), held_out/ (images only) and records.json.

    A training picture with the very bytes of a held-out one is left out.

    Returns:
        The pictures written, in the order of their keys.
    """
    pairs = sorted(found, key=lambda pair: pair[0].key)
    for name in ("captions", "held_out"):
        (folder / name).mkdir()
    hidden = {hashlib.sha256(data).digest() for picture, data in pairs if picture.held_out}
    written = []
    for picture, data in pairs:
        if not picture.held_out and hashlib.sha256(data).digest() in hidden:
            continue
        place = folder / ("held_out" if picture.held_out else "captions") / picture.file
        place.write_bytes(data)
        if not picture.held_out:
            place.with_suffix(".txt").write_text(picture.caption + "\n", encoding="utf-8")
        written.append(picture)
    records = [asdict(picture) for picture in written]
    (folder / "records.json").write_text(
        json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return written


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures of a folder that `write_pictures` made."""
    records = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    return [Picture(**record) for record in records]
