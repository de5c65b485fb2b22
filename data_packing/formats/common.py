"""What the readers share: their options, keys, long texts, how a value is shown."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_packing.document import Document
from data_packing.ledger import Refusal
from data_packing.video import FRAMES

LONGEST_TEXT = 2000
"""Characters above which a text is offered in parts, so that it can be cut between them."""

_BREAKS = (r"(?<=\n)\s*\n", r"(?<=\n)", r"(?<=[.!?])\s", r"\s")
_NAMES = ("id", "key", "uid", "__key__")


@dataclass(frozen=True, slots=True)
class Options:
    """What may be said about a data set beside its format.

    Attributes:
        images: the folder that the paths inside records start from; default: the file's own.
        frames: how many frames of a clip become images.
    """

    images: Path | None = None
    frames: int = FRAMES


DEFAULT = Options()


Draft = Callable[[], Document | Refusal]
"""A record that was found and not looked at closely; called, it opens its images.

So that several processes can share a data set: each finds all records and makes its own.
"""


class Reader(Protocol):
    """Finds the records of a data set of one format."""

    def __call__(self, path: Path, options: Options = DEFAULT) -> Iterator[Draft]: ...


def refused(source: str, key: str, reason: str) -> Draft:
    """A record of which it is known already that it cannot be used."""
    return lambda: Refusal(source, key, reason)


class Keys:
    """Gives every record a key of its own: its name, or its place where it has none.

    Real files repeat names (one image with several conversations): a name that was given already
    gets the place behind it.
    """

    def __init__(self) -> None:
        self._given: set[str] = set()

    def take(self, record: dict[str, Any], place: str, prefix: str = "") -> str:
        """The key of a record that stands at `place`."""
        key = prefix + (_name(record) or place)
        if key in self._given:
            key = f"{key} ({place})"
        self._given.add(key)
        return key


def _name(record: dict[str, Any]) -> str:
    for column in _NAMES:
        value = record.get(column)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return ""


def source_name(path: Path) -> str:
    """The name of the data set: a folder's name, a file's without its ending."""
    if path.is_dir():
        return path.name or path.resolve().name
    return path.stem


def shown(value: Any, longest: int = 80) -> str:
    """A value as a person can read it in a reason: on one line, cut when it is long."""
    text = value if isinstance(value, str) else repr(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def not_json(error: ValueError | RecursionError) -> str:
    """What a text is that `json` cannot read, as a person would say it: "not JSON: …"."""
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"not JSON: {error}"
    return f"JSON with a number of more than {sys.get_int_max_str_digits():,} digits"


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
