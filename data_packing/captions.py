"""When two captions are the same: the rule for splits, duplicates and choices between captions."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["normalised"]

_MARKS = re.compile(r"[^\w\s]|_")
_NUMBERS = re.compile(r"\b\d+\b")
_ARTICLE = re.compile(r"^(?:an?|the|some)\s+")


def normalised(caption: str) -> str:
    """A caption as it is compared: case, punctuation, numbering and article do not count."""
    text = unicodedata.normalize("NFKC", caption).casefold()
    text = " ".join(_NUMBERS.sub(" ", _MARKS.sub(" ", text)).split())
    return _ARTICLE.sub("", text) or caption.strip().casefold()
