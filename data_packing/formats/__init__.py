"""Readers: from files as people have them to documents.

`read` takes a path and yields documents in a fixed order; a record that cannot be used becomes a
`Refusal` with its reason, never an exception and never silence. A path that is no such data set at
all is a ValueError. docs/formats.md shows every format.

Reading order: containers.py and rows.py (how a file keeps its records), layouts.py with
conversation.py and pages.py (what a record means), media.py (its images), table.py (both together);
captions.py, webdataset.py and llamafactory.py are formats of their own.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_packing.document import Document
from data_packing.formats.captions import read_captions
from data_packing.formats.common import DEFAULT, Draft, Options, Reader
from data_packing.formats.detect import detect
from data_packing.formats.llamafactory import read_llamafactory
from data_packing.formats.table import read_layout
from data_packing.formats.webdataset import read_webdataset
from data_packing.ledger import Refusal
from data_packing.storage import here

READERS: dict[str, Reader] = {
    "captions": read_captions,
    "webdataset": read_webdataset,
    "llamafactory": read_llamafactory,
    "llava": partial(read_layout, "llava"),
    "sharegpt": partial(read_layout, "sharegpt"),
    "messages": partial(read_layout, "messages"),
    "swift": partial(read_layout, "swift"),
    "alpaca": partial(read_layout, "alpaca"),
    "interleaved": partial(read_layout, "interleaved"),
    "mmc4": partial(read_layout, "mmc4"),
    "finevision": partial(read_layout, "finevision"),
    "columns": partial(read_layout, "columns"),
}

__all__ = ["READERS", "Draft", "Options", "Reader", "detect", "drafts", "read"]


def read(
    path: str | Path, format: str | None = None, options: Options = DEFAULT
) -> Iterator[Document | Refusal]:
    """Read a file, a folder or a pattern of files as documents.

    Args:
        path: where the data set lies.
        format: a name in READERS; None finds it with `detect`.
        options: where images lie, how many frames a clip gives.

    Raises:
        ValueError: an unknown format, nothing there, a URL, or a data set of another format; it
            says what was seen. What is found on reading is raised with the first document.
    """
    return (draft() for draft in drafts(path, format, options))


def drafts(
    path: str | Path, format: str | None = None, options: Options = DEFAULT
) -> Iterator[Draft]:
    """The records of a data set before their images are opened; arguments and errors as `read`."""
    path = here(path)
    if format is None:
        format = detect(path)
    if format not in READERS:
        close = difflib.get_close_matches(format, READERS, n=1, cutoff=0.5)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown format {format!r}; {guess}Valid: {', '.join(sorted(READERS))}")
    return _explained(path, format, options)


def _explained(path: Path, format: str, options: Options) -> Iterator[Draft]:
    """Read, and where that is impossible say which format it looks like."""
    try:
        yield from READERS[format](path, options)
    except ValueError as error:
        found = format
        with contextlib.suppress(ValueError, OSError):
            found = detect(path)
        if found == format or "it looks like" in str(error):
            raise
        raise ValueError(f"{error}; it looks like {found}") from error
