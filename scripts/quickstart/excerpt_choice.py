"""Which members make an excerpt: the first stamps, the first furniture, ten pages of the manual."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

from scripts.quickstart import gimp, stamps
from scripts.quickstart.archive import members
from scripts.quickstart.excerpt import INSIDE
from scripts.quickstart.fetch import fetch_all
from scripts.quickstart.furniture import catalogue_members

__all__ = ["choose"]

STAMPS = 64
FURNITURE = 64
PAGES = 10
IMAGES_PER_PAGE = 2
PREFIX_MEMBERS = 830
"""Pages whose images are all among the first so many members of the manual's package."""


def choose() -> dict[str, dict[str, str]]:
    """The sha256 of each chosen member, by source and path, in the order of the package."""
    paths = {source.name: path for source, path, _ in fetch_all(apt=True)}
    return {
        "stamps": _stamps(paths["stamps"]),
        "furniture": _furniture(paths["furniture"]),
        "gimp": _pages(paths["gimp"]),
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stamps(package: Path) -> dict[str, str]:
    """The first stamps that have both a text and an image."""
    waiting: dict[str, dict[str, str]] = {}
    chosen: dict[str, str] = {}
    count = 0
    for path, content in members(package):
        stem = stamps.stem_of(path)
        if stem is None or path.suffix not in (".png", ".svg", ".txt"):
            continue
        waiting.setdefault(stem, {})[str(path)] = _hash(content.read())
        if path.suffix == ".txt" and len(waiting[stem]) > 1:
            chosen |= waiting.pop(stem)
            count += 1
            if count == STAMPS:
                return chosen
    raise ValueError(f"only {count} stamps in {package.name}")


def _furniture(package: Path) -> dict[str, str]:
    """The first pieces of the first catalogue (in the public domain)."""
    for path, content in members(package):
        if path.suffix == ".sh3f":
            data = content.read()
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                inner = catalogue_members(archive, FURNITURE)
                return {f"{path}{INSIDE}{name}": _hash(archive.read(name)) for name in inner}
    raise ValueError(f"no catalogue in {package.name}")


def _pages(package: Path) -> dict[str, str]:
    """The first pages with several images, all of them near the beginning of the package."""
    pages: dict[str, bytes] = {}
    images: dict[str, tuple[int, bytes]] = {}
    for number, (path, content) in enumerate(members(package)):
        name = gimp.name_of(path)
        if path.suffix == ".html" and not images:
            pages[name] = content.read()
        elif path.suffix in gimp.IMAGE_SUFFIXES:
            images[name] = (number, content.read())
    sizes = {name: size for name, (_, data) in images.items() if (size := gimp.size_of(data))}
    near = {name for name, (number, _) in images.items() if number < PREFIX_MEMBERS}
    chosen: list[str] = []
    used: set[str] = set()
    for name, html in sorted(pages.items()):
        shown = [block.image for block in gimp.blocks(html, sizes) if block.image]
        if len(shown) >= IMAGES_PER_PAGE and all(image in near for image in shown):
            chosen.append(name)
            used |= set(shown)
        if len(chosen) == PAGES:
            break
    content_of = {
        **{name: pages[name] for name in chosen},
        **{name: images[name][1] for name in used},
    }
    return {gimp.ROOT + name: _hash(data) for name, data in sorted(content_of.items())}
