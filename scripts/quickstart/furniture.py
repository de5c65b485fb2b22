"""Sweet Home 3D furniture: renders with name, category, true size and translations."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.quickstart.archive import members
from scripts.quickstart.captions import Picture, held_out, kept, shrunk, write_pictures
from scripts.quickstart.console import Advance

__all__ = ["build", "catalogue", "catalogue_members", "properties"]

LANGUAGES = ("fr", "de", "es")
_CATALOGUE = "PluginFurnitureCatalog"
_ENTRY = re.compile(r"^(\w+)#(\d+)$")
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


def build(package: Path, fraction: float, folder: Path, advance: Advance) -> dict[str, Any]:
    """Write the furniture's pictures of both splits to `folder`; returns counts."""
    found: list[tuple[Picture, bytes]] = []
    stats = {"without image": 0}
    for path, content in members(package):
        if path.suffix == ".sh3f":
            data = io.BytesIO(content.read())
            found += [
                pair for pair in catalogue(data, path.stem, stats) if kept(pair[0].key, fraction)
            ]
            advance(len(found), 0)
    written = write_pictures(folder, found)
    hidden = sum(picture.held_out for picture in written)
    categories = {picture.category for picture in written}
    return {
        "pictures": len(written),
        "train": len(written) - hidden,
        "held out": hidden,
        "categories": len(categories),
        **stats,
    }


def catalogue(
    file: io.BytesIO, name: str, stats: dict[str, int]
) -> Iterator[tuple[Picture, bytes]]:
    """The pieces of one .sh3f catalogue (a zip) with their icons."""
    with zipfile.ZipFile(file) as archive:
        pieces = _numbered(archive.read(f"{_CATALOGUE}.properties"))
        general = properties(archive.read(f"{_CATALOGUE}.properties"))
        others = {
            language: _numbered(archive.read(f"{_CATALOGUE}_{language}.properties"))
            for language in LANGUAGES
            if f"{_CATALOGUE}_{language}.properties" in archive.namelist()
        }
        names = set(archive.namelist())
        for number, piece in sorted(pieces.items()):
            icon = piece.get("icon", "").lstrip("/")
            if icon not in names or not piece.get("name"):
                stats["without image"] += 1
                continue
            yield _picture(name, number, piece, general, others), shrunk(archive.read(icon))


def catalogue_members(archive: zipfile.ZipFile, pieces: int) -> list[str]:
    """The members of a catalogue that its first so many pieces are read from."""
    texts = [f"{_CATALOGUE}.properties"]
    texts += [f"{_CATALOGUE}_{language}.properties" for language in LANGUAGES]
    numbered = _numbered(archive.read(texts[0]))
    icons = [numbered[number]["icon"].lstrip("/") for number in sorted(numbered)]
    return [name for name in (*texts, *icons[:pieces]) if name in archive.namelist()]


def _picture(
    catalogue_name: str,
    number: int,
    piece: dict[str, str],
    general: dict[str, str],
    others: dict[str, dict[int, dict[str, str]]],
) -> Picture:
    key = f"furniture-{re.sub(r'[^a-z0-9]+', '-', catalogue_name.lower())}-{number:04d}"
    translated = {
        language: entries[number]["name"]
        for language, entries in others.items()
        if entries.get(number, {}).get("name")
    }
    return Picture(
        key=key,
        source="furniture",
        caption=piece["name"],
        file=f"{key}.png",
        category=piece.get("category"),
        names=translated,
        width_cm=_number(piece.get("width")),
        depth_cm=_number(piece.get("depth")),
        height_cm=_number(piece.get("height")),
        creator=piece.get("creator") or general.get("name"),
        licence=general.get("license"),
        held_out=held_out(piece["name"]),
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _numbered(data: bytes) -> dict[int, dict[str, str]]:
    """`name#3=Bed` lines by number: {3: {"name": "Bed"}}."""
    table: dict[int, dict[str, str]] = {}
    for key, value in properties(data).items():
        if match := _ENTRY.match(key):
            table.setdefault(int(match[2]), {})[match[1]] = value
    return table


def properties(data: bytes) -> dict[str, str]:
    """A Java properties file (ISO 8859-1 with \\uXXXX escapes, `#` comments) as a dict."""
    table = {}
    for line in data.decode("latin-1").splitlines():
        if line.startswith(("#", "!")) or "=" not in line:
            continue
        key, value = line.split("=", 1)
        table[key.strip()] = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), value).strip()
    return table
