"""What the readers share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from data_packing.document import DocumentError, Image, Role

LONGEST_TEXT = 2000
"""Characters above which a text is offered in parts, so that it can be cut between them."""

_BREAKS = (r"(?<=\n)\s*\n", r"(?<=\n)", r"(?<=[.!?])\s", r"\s")


def open_image(folder: Path, name: Any, role: Role | None = None) -> Image:
    """Open an image named inside a record; it must lie inside `folder`.

    Raises:
        DocumentError: not a name, outside the folder, missing, or no usable image.
    """
    if not isinstance(name, str) or not name:
        raise DocumentError(f"an image must be a file name, not {name!r}")
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError) as error:  # no file can have such a name
        raise DocumentError(f"image {name!r}: {error}") from error
    if not inside:
        raise DocumentError(f"image {name} lies outside of {folder}")
    try:
        return Image.open(path, role)
    except DocumentError as error:
        raise DocumentError(str(error).replace(str(path), name)) from error


def divide(text: str, longest: int = LONGEST_TEXT) -> list[str]:
    """Divide a long text at blank lines, else lines, sentences, spaces; joined it is the same.

    The parts are at most `longest` characters, unless there is no space to cut at.
    """
    if len(text) <= longest:
        return [text]
    for pattern in _BREAKS:
        cuts = [match.end() for match in re.finditer(pattern, text) if match.end() < len(text)]
        before = [at for at in cuts if 0 < at <= longest]
        if before:
            return [text[: before[-1]], *divide(text[before[-1] :], longest)]
    cuts = [match.end() for match in re.finditer(r"\s", text) if match.end() < len(text)]
    return [text[: cuts[0]], *divide(text[cuts[0] :], longest)] if cuts else [text]
