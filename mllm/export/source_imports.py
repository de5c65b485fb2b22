"""The imports at the head of an exported folder's file."""

from __future__ import annotations

import sys

MARGIN = 100
"""The longest line."""


def import_lines(wanted: set[tuple[str, str]]) -> str:
    """The lines that import, as a person sorts them."""
    groups: tuple[list[str], list[str]] = ([], [])
    modules = sorted({module for module, _ in wanted}, key=str.lower)
    for whole in (True, False):
        for module in modules:
            names = sorted({name for source, name in wanted if source == module}, key=_isort)
            plain = [name for name in names if name == "" or name.startswith("as ")]
            rest = [name for name in names if name not in plain]
            group = groups[module.split(".")[0] not in sys.stdlib_module_names]
            if whole:
                group += [f"import {module} {name}".rstrip() for name in plain]
            elif rest and module != "__future__":
                group.append(_import_from(module, rest))
    lines = ["from __future__ import annotations", *("\n".join(group) for group in groups if group)]
    return "\n\n".join(lines)


def _import_from(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= MARGIN:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])


def _isort(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff sorts them."""
    constant = name.isupper() and len(name) > 1
    return (0 if constant else 1 if name[0:1].isupper() else 2, name.lower())
