"""The GIMP manual as interleaved pages: text and images in the order of the document."""

from __future__ import annotations

import io
import json
import posixpath
import re
import warnings
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from bs4 import BeautifulSoup, Tag, XMLParsedAsHTMLWarning
from bs4.element import NavigableString
from PIL import Image

from data_packing.captions import normalised
from scripts.quickstart.archive import members
from scripts.quickstart.captions import kept, shrunk
from scripts.quickstart.console import Advance

__all__ = ["Block", "blocks", "build", "windows"]

MIN_SIDE = 64
"""Smaller images are icons: they stand in the middle of sentences and show almost nothing."""

MIN_WORDS = 40
WINDOW_TOKENS = 1500
TOKENS_PER_IMAGE = 16
CHARACTERS_PER_TOKEN = 4.2
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
NAVIGATION = ("navheader", "navfooter", "toc", "index", "indexdiv", "footnotes")
ROOT = "usr/share/gimp/2.0/help/en/"
_FIGURE_NUMBER = re.compile(r"^(?:Figure|Table|Example)\s+[\w.]+?\.\s+")
_SECTION_NUMBER = re.compile(r"^(?:\d+\.)+\s*")
_TEXT_TAGS = ("p", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "td", "th", "li", "dd", "pre")


@dataclass(slots=True)
class Block:
    """What is never torn apart: some text, or an image with the caption that follows it."""

    text: str = ""
    image: str | None = None

    @property
    def tokens(self) -> int:
        """About how many tokens it takes; packing counts exactly later."""
        image = 0 if self.image is None else TOKENS_PER_IMAGE
        return image + round(len(self.text) / CHARACTERS_PER_TOKEN)


@dataclass(slots=True)
class _Page:
    """What the walk through one page collects."""

    sizes: dict[str, tuple[int, int]]
    found: list[Block] = field(default_factory=list)


def build(
    package: Path, fraction: float, avoid: Set[str], folder: Path, advance: Advance
) -> dict[str, Any]:
    """Write pages.jsonl and images/ to `folder`; returns counts.

    Args:
        avoid: normalised captions that no text of a page may equal (the held-out ones).
    """
    pages, images = _read(package)
    sizes = {name: size for name, data in images.items() if (size := size_of(data)) is not None}
    counts = {"pages": 0, "windows": 0, "images": 0, "words": 0, "left out": 0}
    used: set[str] = set()
    with (folder / "pages.jsonl").open("w", encoding="utf-8") as output:
        for number, (name, html) in enumerate(sorted(pages.items())):
            advance(number + 1, len(pages))
            if not kept(name, fraction):
                continue
            found = blocks(html, sizes)
            words = sum(len(block.text.split()) for block in found)
            leak = any(normalised(block.text) in avoid for block in found)
            if words < MIN_WORDS or leak or not any(block.image for block in found):
                counts["left out"] += 1
                continue
            counts["pages"] += 1
            for part, window in enumerate(windows(found)):
                output.write(_record(f"gimp-{name.removesuffix('.html')}-{part}", window))
                counts["windows"] += 1
                counts["words"] += sum(len(block.text.split()) for block in window)
                used.update(block.image for block in window if block.image)
    (folder / "images").mkdir()
    for name in sorted(used):
        (folder / "images" / _flat(name)).write_bytes(shrunk(images[name]))
    counts["images"] = len(used)
    return counts


def _read(package: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    pages: dict[str, bytes] = {}
    images: dict[str, bytes] = {}
    for path, content in members(package):
        name = name_of(path)
        if path.suffix == ".html":
            pages[name] = content.read()
        elif path.suffix in IMAGE_SUFFIXES:
            images[name] = content.read()
    return pages, images


def name_of(path: PurePosixPath) -> str:
    """The path of a file of the manual from its pages."""
    return str(path).removeprefix(ROOT)


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an image file; None if it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except OSError:
        return None


def _flat(name: str) -> str:
    return name.removeprefix("images/").replace("/", "-")


def _record(key: str, window: list[Block]) -> str:
    texts: list[str | None] = []
    images: list[str | None] = []
    for block in window:
        if block.image:
            texts.append(None)
            images.append(f"images/{_flat(block.image)}")
        if block.text:
            texts.append(block.text + "\n\n")
            images.append(None)
    return json.dumps({"key": key, "texts": texts, "images": images}, ensure_ascii=False) + "\n"


def windows(found: list[Block], tokens: int = WINDOW_TOKENS) -> Iterator[list[Block]]:
    """Cut a page into windows of about `tokens`; only windows with an image are worth keeping."""
    window: list[Block] = []
    size = 0
    for block in found:
        if window and size + block.tokens > tokens:
            if any(other.image for other in window):
                yield window
            window, size = [], 0
        window.append(block)
        size += block.tokens
    if any(block.image for block in window):
        yield window


def blocks(html: bytes, sizes: dict[str, tuple[int, int]]) -> list[Block]:
    """Text and images of a page in order, without navigation, icons and indexes.

    A figure's title stands above it in the manual; here it follows its image as a caption.

    Args:
        html: the page.
        sizes: (width, height) of the images that exist, by their path from the page.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # it is XHTML; this reads it well
        soup = BeautifulSoup(html, "lxml")
    page = _Page(sizes)
    if isinstance(soup.body, Tag):
        _walk(soup.body, page)
    return page.found


def _walk(node: Tag, page: _Page) -> None:
    for child in node.children:
        if not isinstance(child, Tag) or _is_navigation(child):
            continue
        if _is_figure(child):
            _figure(child, page)
        elif child.name == "img":
            _image(child, page, "")
        elif child.name in _TEXT_TAGS and not _has_blocks(child):
            _paragraph(child, page)
        else:
            _loose_text(child, page)
            _walk(child, page)


def _is_navigation(tag: Tag) -> bool:
    return any(name in NAVIGATION for name in tag.get("class") or ())


def _is_figure(tag: Tag) -> bool:
    classes = tag.get("class") or ()
    return tag.name == "div" and any(name in ("figure", "informalfigure") for name in classes)


def _has_blocks(tag: Tag) -> bool:
    return tag.find((*_TEXT_TAGS, "div", "ul", "ol", "table")) is not None


def _figure(tag: Tag, page: _Page) -> None:
    title = tag.find("p", class_="title")
    caption = _FIGURE_NUMBER.sub("", _text(title)) if isinstance(title, Tag) else ""
    pictures = tag.find_all("img")
    for number, picture in enumerate(pictures):
        below = picture.find_next("div", class_="caption")
        own = _text(below) if isinstance(below, Tag) and below in tag.descendants else ""
        last = number == len(pictures) - 1
        _image(picture, page, "\n".join(filter(None, (own, caption if last else ""))))


def _image(tag: Tag, page: _Page, caption: str) -> None:
    name = posixpath.normpath(str(tag.get("src") or ""))
    if min(page.sizes.get(name, (0, 0))) >= MIN_SIDE:
        page.found.append(Block(caption, name))
    elif caption:
        page.found.append(Block(caption))


def _paragraph(tag: Tag, page: _Page) -> None:
    text = _SECTION_NUMBER.sub("", _text(tag)) if tag.name.startswith("h") else _text(tag)
    if tag.name == "li" and text:
        text = f"- {text}"
    if text:
        page.found.append(Block(text))
    for picture in tag.find_all("img"):
        _image(picture, page, "")


def _loose_text(tag: Tag, page: _Page) -> None:
    """Text that stands directly in a container beside its blocks."""
    words = " ".join(str(child) for child in tag.children if type(child) is NavigableString).split()
    if len(words) > 2:
        page.found.append(Block(" ".join(words)))


def _text(tag: Tag) -> str:
    return " ".join(tag.get_text().split())
