"""Interleaved pages, JSON lines in the layout of OBELICS (arXiv 2306.16527).

One page per line: `{"key": …, "texts": [str | null, …], "images": [path | null, …]}`, two lists of
one length with exactly one value at each place. Image paths are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_packing.document import Document, DocumentError, Part, Text
from data_packing.formats.common import divide, open_image
from data_packing.ledger import Refusal


def read_interleaved(path: Path) -> Iterator[Document | Refusal]:
    """Read pages in file order. Long texts are divided, so that a page can be cut inside them.

    Raises:
        ValueError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"interleaved: no file at {path}")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            key = f"line {number}"
            try:
                record = _record(line)
                name = record.get("key")
                if not isinstance(name, str) or not name:
                    raise DocumentError('no "key" (a text that names the page)')
                key = name
                yield Document(tuple(_parts(record, path.parent)), path.stem, key)
            except DocumentError as error:
                yield Refusal(path.stem, key, str(error))


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DocumentError(f"a page must be an object, not {type(record).__name__}")
    return record


def _parts(record: dict[str, Any], folder: Path) -> Iterator[Part]:
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
            yield open_image(folder, image)
        elif not isinstance(text, str):
            raise DocumentError(f"place {place}: text must be a string, not {text!r}")
        else:
            yield from map(Text, divide(text))
