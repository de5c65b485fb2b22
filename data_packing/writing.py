"""Which scripts a text is written in, by the Unicode blocks of its letters.

This is no guess at the language: English, French and Malay are all Latin here. It shows what the
shards hold too much or nothing of, and text that was decoded wrongly. Signs, digits and spaces are
counted nowhere.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

_RANGES = (
    (0x0041, 0x005A, "Latin"),
    (0x0061, 0x007A, "Latin"),
    (0x00C0, 0x00D6, "Latin"),
    (0x00D8, 0x00F6, "Latin"),
    (0x00F8, 0x024F, "Latin"),
    (0x0370, 0x03FF, "Greek"),
    (0x0400, 0x052F, "Cyrillic"),
    (0x0531, 0x058F, "Armenian"),
    (0x05D0, 0x05F4, "Hebrew"),
    (0x0620, 0x077F, "Arabic"),
    (0x0900, 0x097F, "Devanagari"),
    (0x0980, 0x09FF, "Bengali"),
    (0x0A00, 0x0A7F, "Gurmukhi"),
    (0x0A80, 0x0AFF, "Gujarati"),
    (0x0B80, 0x0BFF, "Tamil"),
    (0x0C00, 0x0C7F, "Telugu"),
    (0x0C80, 0x0CFF, "Kannada"),
    (0x0D00, 0x0D7F, "Malayalam"),
    (0x0D80, 0x0DFF, "Sinhala"),
    (0x0E00, 0x0E7F, "Thai"),
    (0x0E80, 0x0EFF, "Lao"),
    (0x0F00, 0x0FFF, "Tibetan"),
    (0x1000, 0x109F, "Burmese"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1100, 0x11FF, "Hangul"),
    (0x1200, 0x139F, "Ethiopic"),
    (0x1780, 0x17FF, "Khmer"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x1F00, 0x1FFF, "Greek"),
    (0x3041, 0x30FF, "Kana"),
    (0x3105, 0x312F, "Bopomofo"),
    (0x3131, 0x318E, "Hangul"),
    (0x3400, 0x4DBF, "Han"),
    (0x4E00, 0x9FFF, "Han"),
    (0xAC00, 0xD7A3, "Hangul"),
    (0xF900, 0xFAFF, "Han"),
    (0xFB50, 0xFDFF, "Arabic"),
    (0xFE70, 0xFEFC, "Arabic"),
    (0xFF66, 0xFF9D, "Kana"),
    (0x1F300, 0x1FAFF, "emoji"),
    (0x20000, 0x323AF, "Han"),
)
_STARTS = np.array([first for first, _, _ in _RANGES], dtype=np.uint32)
_ENDS = np.array([last for _, last, _ in _RANGES], dtype=np.uint32)


def count_scripts(text: str) -> Counter[str]:
    """Letters of a text by script."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    place = np.searchsorted(_STARTS, codes, side="right").astype(np.int64) - 1
    inside = (place >= 0) & (codes <= _ENDS[place])
    ranges, counts = np.unique(place[inside], return_counts=True)
    scripts: Counter[str] = Counter()
    for number, count in zip(ranges.tolist(), counts.tolist(), strict=True):
        scripts[_RANGES[number][2]] += count
    return scripts
