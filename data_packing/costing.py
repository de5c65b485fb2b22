"""What a document costs, checked: `cost` comes from outside, and the plan relies on it."""

from __future__ import annotations

from collections.abc import Callable

from data_packing.document import Document, DocumentError
from data_packing.sample import Cost


def checked_cost(document: Document, cost: Callable[[Document], Cost]) -> tuple[Cost, list[int]]:
    """Return what the document costs, and which of its images no piece names, by number.

    Only frames may be left out, and of each clip one stays: a cost that forgets an image otherwise
    would make packs longer than planned.

    Raises:
        DocumentError: `cost` refuses it, or nothing in it can be learned.
        ValueError: images that are missing, named twice or out of order, or negative tokens.
        RuntimeError: `cost` failed.
    """
    try:
        price = cost(document)
    except DocumentError:
        raise
    except Exception as error:
        raise RuntimeError(f"cost() failed on document {document.key!r}: {error}") from error
    left_out = _left_out(document, price)
    if not price.pieces:
        raise DocumentError("nothing to learn from: the document has no piece")
    if price.overhead < 0 or any(text < 0 for text, _ in price.pieces):
        raise ValueError(f"cost() of document {document.key!r} is negative: {price}")
    return price, left_out


def _left_out(document: Document, price: Cost) -> list[int]:
    clips = [image.clip for image in document.images]
    named = [image for _, images in price.pieces for image in images]
    kept = [at for at in range(len(clips)) if at in named]
    left_out = [at for at in range(len(clips)) if at not in named]
    shown = {clips[at] for at in kept} - {0}
    if named != kept or any(clips[at] not in shown for at in left_out):
        raise ValueError(
            f"cost() of document {document.key!r} names the images {named}; it must name each of "
            f"the {len(clips)} once, in order, but for frames that their clip can go without"
        )
    return left_out
