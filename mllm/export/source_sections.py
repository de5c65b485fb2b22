"""Sections of the `standalone` modules: lines that only some exported models need."""

from __future__ import annotations

import re

SECTIONS = {"asked", "before_begin", "blocks", "marked", "newline", "regions", "spatial", "tiles"}
"""What a section begins with, as a comment of its own; it goes on to `# end`."""


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
