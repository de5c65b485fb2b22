"""From a planned document to its sample, as the loader and the preview make it."""

from __future__ import annotations

from collections.abc import Callable

from data_packing.document import Document, DocumentError
from data_packing.planned import Entry
from data_packing.sample import Sample

Encode = Callable[[Document], Sample]


def encode_entry(document: Document, entry: Entry, encode: Encode) -> tuple[Document, Sample]:
    """Return what of a document is in a pack, and its sample.

    Raises:
        DocumentError: `encode` refuses it, or it takes other tokens than the plan says.
    """
    if not entry.whole:
        document = document.select(entry.start_piece, entry.stop_piece)
    sample = encode(document)
    if len(sample.input_ids) != entry.tokens:
        raise DocumentError(
            f"encoded to {len(sample.input_ids)} tokens, the plan says {entry.tokens}: the "
            "index was made with other settings, or the processor counts wrongly"
        )
    return document, sample
