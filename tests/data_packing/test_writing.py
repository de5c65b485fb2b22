from __future__ import annotations

import sys
import unicodedata

import pytest

from data_packing.writing import _RANGES, count_scripts


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        ("A cat, 3 dogs!", {"Latin": 8}),
        ("Ünïcödé ßæ", {"Latin": 9}),
        ("кот и α", {"Cyrillic": 4, "Greek": 1}),
        ("日本語のテスト", {"Han": 3, "Kana": 4}),
        ("한국어 עברית العربية", {"Hangul": 3, "Hebrew": 5, "Arabic": 7}),
        ("हिन्दी ไทย", {"Devanagari": 6, "Thai": 3}),
        ("🙂𠀋", {"emoji": 1, "Han": 1}),
        ("12 + 3 × 4 ÷ 5 \ud800", {}),
        ("", {}),
    ],
)
def test_letters_are_counted_by_script(text: str, scripts: dict[str, int]) -> None:
    assert count_scripts(text) == scripts


def test_ranges_ascend_and_agree_with_the_names_of_letters() -> None:
    ends = [-1, *(last for _, last, _ in _RANGES)]
    assert all(first > end for (first, _, _), end in zip(_RANGES, ends, strict=False))
    aliases = {"Han": "CJK", "Burmese": "MYANMAR", "Kana": ("HIRAGANA", "KATAKANA", "HALFWIDTH")}
    for script in ("Latin", "Greek", "Cyrillic", "Hebrew", "Thai", "Han", "Burmese", "Kana"):
        start = aliases.get(script, script.upper())
        for code in range(0x250, min(sys.maxunicode, 0xD000)):
            letter = chr(code)
            if script in count_scripts(letter) and unicodedata.category(letter) == "Lo":
                assert unicodedata.name(letter).startswith(start), hex(code)
