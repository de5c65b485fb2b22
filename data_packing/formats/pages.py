"""Interleaved pages: images and texts in reading order, without roles.

OBELICS (arXiv 2306.16527) keeps two lists of one length, `texts` and `images`, with exactly one
value at each place. MMC4 (arXiv 2304.06939) keeps sentences in `text_list`, and in `image_info`
the number of the sentence that each image belongs to; the image goes in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from data_packing.document import DocumentError, Part, Text
from data_packing.formats.common import divide, shown
from data_packing.formats.media import Media


def obelics_parts(record: dict[str, Any], media: Media) -> Iterator[Part]:
    """The parts of a page in the layout of OBELICS.

    Long texts are divided, so that a page can be cut inside them.
    """
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list):
        raise DocumentError('"texts" and "images" must both be lists')
    if len(texts) != len(images):
        raise DocumentError(
            f'{len(texts)} "texts" but {len(images)} "images": they must be equally long, with '
            "null where the other has a value"
        )
    if not texts:
        raise DocumentError("the page is empty")
    for place, (text, image) in enumerate(zip(texts, images, strict=True), start=1):
        if (text is None) == (image is None):
            both = "neither text nor image" if text is None else "both text and image"
            raise DocumentError(f"place {place} has {both}")
        if image is not None:
            yield media.image(image)
        elif not isinstance(text, str):
            raise DocumentError(f"place {place}: text must be a string, not {shown(repr(text))}")
        else:
            yield from map(Text, divide(text))


def mmc4_parts(record: dict[str, Any], media: Media) -> Iterator[Part]:
    """The parts of a page in the layout of MMC4; sentences between images are joined by a space."""
    sentences, images = record.get("text_list"), record.get("image_info")
    if not isinstance(sentences, list) or not isinstance(images, list | None):
        raise DocumentError('"text_list" and "image_info" must both be lists')
    for place, sentence in enumerate(sentences, start=1):
        if not isinstance(sentence, str):
            raise DocumentError(f"sentence {place} must be a string, not {shown(repr(sentence))}")
    before = _matched(images or [], len(sentences))
    page = [item for at, text in enumerate(sentences) for item in (*before.get(at, []), text)]
    if not any(not isinstance(item, str) or item.strip() for item in page):
        raise DocumentError("the page is empty")
    for is_text, items in groupby(page, key=lambda item: isinstance(item, str)):
        if is_text:
            joined = " ".join(item for item in items if item.strip())
            yield from map(Text, divide(joined) if joined else [])
        else:
            yield from map(media.image, (_name(item) for item in items))


def _matched(images: list[Any], sentences: int) -> dict[int, list[dict[str, Any]]]:
    """The images of each sentence, in the order of the record."""
    before: dict[int, list[dict[str, Any]]] = {}
    for number, image in enumerate(images, start=1):
        at = image.get("matched_text_index") if isinstance(image, dict) else None
        if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < sentences:
            raise DocumentError(
                f'image {number}: "matched_text_index" must be a number from 0 to '
                f"{sentences - 1}, not {shown(repr(at))}"
            )
        before.setdefault(at, []).append(image)
    return before


def _name(image: dict[str, Any]) -> Any:
    return image.get("image_name") or image.get("bytes") or image.get("raw_url")
