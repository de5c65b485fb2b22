"""Several texts for one place, by name: the page's words, synthetic captions, translations.

A record keeps them in the column `texts`, a mapping from name to text. The text that is used when
nobody chooses is the caption where there is one, else the variant that the file names first: the
one order that whoever wrote the file decided on.
"""

from __future__ import annotations

from typing import Any

from data_packing.document import DocumentError, Text
from data_packing.formats.common import shown

COLUMN = "texts"


def has_variants(record: dict[str, Any]) -> bool:
    """Whether a record has a mapping of texts; other layouts keep a list in the same column."""
    return isinstance(record.get(COLUMN), dict)


def read_variants(record: dict[str, Any]) -> dict[str, str]:
    """The texts of a record by name, in its order; null counts as absent.

    Raises:
        DocumentError: one is empty or no text, or has no name.
    """
    found: dict[str, str] = {}
    for name, words in record[COLUMN].items() if has_variants(record) else ():
        if words is None:
            continue
        if not name:
            raise DocumentError(f'a text in "{COLUMN}" has no name')
        if not isinstance(words, str):
            raise DocumentError(
                f"the text {shown(repr(name))} must be a text, not {shown(repr(words))}"
            )
        if not words.strip():
            raise DocumentError(f"the text {shown(repr(name))} is empty")
        found[name] = words.strip()
    return found


def text_of(caption: str | None, variants: dict[str, str]) -> Text:
    """The text of a record that has a caption, variants or both."""
    words = next(iter(variants.values())) if caption is None else caption
    return Text(words, variants=tuple(variants.items()))
