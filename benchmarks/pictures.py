"""Drawn pictures with captions, written as our shards and as WebDataset's, for reading.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import webdataset

from data_packing.document import Document, Image, Text
from data_packing.images import decode
from data_packing.index import Index, build_index
from data_packing.sample import Cost, Sample
from data_packing.sharding import write_shards

SIDE, CAPTION, BATCH = 384, 60, 32
IMAGE_TOKENS = 68
CAPACITY = BATCH * (IMAGE_TOKENS + CAPTION)  # so a pack is exactly a batch
PER_SHARD = 500


def picture(random: np.random.Generator) -> bytes:
    """A JPEG of about 41 KB: a gradient, some boxes, and noise."""
    ramp = np.linspace(0, 120, SIDE)
    pixels = ramp[:, None, None] + ramp[None, :, None] * random.random(3) + random.integers(0, 60)
    for _ in range(12):
        top, left, height, width = random.integers(0, SIDE // 2, 4)
        pixels[top : top + height, left : left + width] += random.integers(-90, 90, 3)
    pixels = pixels + random.normal(0, 9.6, (SIDE, SIDE, 3))
    return bytes(simplejpeg.encode_jpeg(np.clip(pixels, 0, 255).astype(np.uint8), 80))


def draw(count: int, seed: int) -> Iterator[Document]:
    """Documents: a picture and a caption of fixed length."""
    random = np.random.default_rng(seed)
    for number in range(count):
        text = f"picture {number:06d} ".ljust(CAPTION - 1, "x")
        image = Image(picture(random), SIDE, SIDE)
        yield Document((image, Text(text)), "pictures", f"k{number:06d}")


def write(documents: Sequence[Document], folder: Path) -> tuple[Index, str]:
    """Both kinds of shards. Returns our index and the pattern of WebDataset's."""
    report = write_shards(documents, folder / "ours", "pictures", PER_SHARD)
    theirs = folder / "theirs"
    theirs.mkdir()
    shards = range(0, len(documents), PER_SHARD)
    for number, start in enumerate(shards):
        with webdataset.TarWriter(str(theirs / f"pictures-{number:06d}.tar")) as sink:
            for document in documents[start : start + PER_SHARD]:
                image, text = document.parts
                assert isinstance(image, Image)
                assert isinstance(text, Text)
                sink.write({"__key__": document.key, "jpg": image.data, "txt": text.text})
    pattern = f"{theirs}/pictures-{{000000..{len(shards) - 1:06d}}}.tar"
    return build_index(report.paths, cost, "reading"), pattern


def cost(document: Document) -> Cost:
    """One token per letter and one at the end."""
    return Cost(1, ((CAPTION - 1, (0,)),))


def image_cost(height: int, width: int) -> tuple[int, int]:
    """Any number will do; this one makes a pack a batch."""
    return IMAGE_TOKENS, 1


def encode(document: Document) -> Sample:
    """Decode the image; letters are tokens."""
    image, text = document.parts
    assert isinstance(image, Image)
    assert isinstance(text, Text)
    letters = np.frombuffer(text.text.encode(), dtype=np.uint8).astype(np.int64)
    ids = np.concatenate([np.zeros(IMAGE_TOKENS + 1, dtype=np.int64), letters])
    return Sample(ids, ids, pixels=[decode(image.data)], source=document.source, key=document.key)
