"""Sections of the `standalone` modules: lines that only some exported models need."""

from __future__ import annotations

import re

SECTIONS = {
    "asked": "connectors that read what is asked about an image",
    "before_begin": "images that stand before the begin token",
    "blocks": "images whose tokens see each other in both directions",
    "fused": "images that reach the language model's layers, beside `standalone_fused`",
    "in_sequence": "images that do not",
    "marked": "chat templates with a mark of their own for an image",
    "newline": "lines of visual tokens that end with a learned row",
    "ordered": "visual tokens that do not stand as they are made",
    "regions": "features of regions in the text",
    "spatial": "language models with positions in three directions",
    "tiles": "images that are cut",
}
"""Section → what it is for. It begins with its name as a comment and goes on to `# end`."""


def with_sections(text: str, sections: frozenset[str]) -> str:
    """Leave out the lines of other sections, and the marks; sections may lie in each other."""
    lines: list[str] = []
    inside: list[bool] = []
    for line in text.splitlines():
        mark = re.fullmatch(r" *# (\w+)", line)
        if mark and mark[1] in SECTIONS:
            inside.append(mark[1] in sections)
        elif mark and mark[1] == "end":
            inside.pop()
        elif all(inside):
            lines.append(line)
    return "\n".join(lines)
