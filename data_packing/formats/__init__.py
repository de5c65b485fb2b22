"""Readers: from files as people have them to documents.

Each takes a path and yields documents in a fixed order; a record that cannot be used becomes a
`Refusal` with its reason, never an exception and never silence. A path that is no such data set at
all is a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from data_packing.document import Document
from data_packing.formats.captions import read_captions
from data_packing.formats.interleaved import read_interleaved
from data_packing.formats.llava import read_llava
from data_packing.ledger import Refusal

Reader = Callable[[Path], Iterator[Document | Refusal]]

READERS: dict[str, Reader] = {
    "captions": read_captions,
    "interleaved": read_interleaved,
    "llava": read_llava,
}

__all__ = ["READERS", "Reader", "read_captions", "read_interleaved", "read_llava"]
