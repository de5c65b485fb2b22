"""Captions: a folder of images or clips, each with a text file of the same stem.

The first line of the text is used. Endings may be written in capitals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_packing import video
from data_packing.document import Document, DocumentError, Image, Text
from data_packing.formats.common import DEFAULT, Draft, Options, refused, source_name
from data_packing.formats.media import Media, inside
from data_packing.ledger import Refusal

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")

OTHERS = (
    *(".avif", ".heic", ".heif", ".hif", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl", ".jxr"),
    *(".dds", ".eps", ".exr", ".hdr", ".psb", ".psd", ".svg", ".svgz", ".tga", ".wmf", ".xcf"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),
)
"""Endings of images of kinds that cannot be read."""


def read_captions(path: Path, options: Options = DEFAULT) -> Iterator[Draft]:
    """Read pairs from a folder and the folders in it, in order of their names.

    The key is the path of the image or clip inside the folder. A text file without one is refused
    too, and so are images of kinds that cannot be read, links to nothing and links to folders.

    Raises:
        ValueError: no such folder, or no image, clip or caption in it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"captions: {path} is not a folder")
    files: list[Path] = []
    faults: dict[Path, str] = {}
    others: dict[Path, Path] = {}
    for file in sorted(path.rglob("*")):
        if fault := _fault(file):
            faults[file] = fault
        elif (is_media(file) or file.suffix.lower() == ".txt") and not file.is_dir():
            files.append(file)
        elif file.suffix:
            others.setdefault(file.with_suffix(""), file)
    shown = sorted([*(file for file in files if is_media(file)), *faults])
    stems = {file.with_suffix("") for file in shown if file.suffix}
    texts: dict[Path, Path] = {}
    alone: list[tuple[Path, str]] = []
    for file in reversed(files):  # a.txt before a.TXT
        if is_media(file):
            continue
        if file.with_suffix("") not in stems:
            beside = _said(others.get(file.with_suffix("")))
            alone.append((file, f"a caption without an image of the same name{beside}"))
        elif texts.setdefault(file.with_suffix(""), file) != file:
            alone.append((file, f"a second caption beside {texts[file.with_suffix('')].name}"))
    if not shown and not alone:
        raise ValueError(f"captions: no image in {path} (looked for {', '.join(EXTENSIONS)})")
    source, media = source_name(path), Media(path, options.frames)
    for file in shown:
        if file in faults:
            yield refused(source, file.relative_to(path).as_posix(), faults[file])
            continue
        text = texts.get(file.with_suffix(""), file.with_suffix(".txt"))
        yield partial(_document, path, file, text, media, source)
    for file, reason in reversed(alone):
        yield refused(source, file.relative_to(path).as_posix(), reason)


def _fault(file: Path) -> str:
    """Why an image, or what may hold some, cannot be used; nothing where it can or is neither."""
    ending = file.suffix.lower()
    if file.is_dir():
        link = "a link to a folder is not followed: give the folder itself"
        return link if file.is_symlink() else ""
    if not is_media(file) and ending not in OTHERS:
        return ""
    if not file.is_file():
        return "a link to nothing" if file.is_symlink() else "no plain file"
    if ending in OTHERS:
        return f"{ending[1:].upper()} is not a kind of image that can be read: convert it"
    return ""


def _said(other: Path | None) -> str:
    """What stands beside a caption in the place of an image."""
    if other is None:
        return ""
    return f": {other.name} is {'a folder' if other.is_dir() else 'not read as one'}"


def _document(
    folder: Path, file: Path, text: Path, media: Media, source: str
) -> Document | Refusal:
    key = file.relative_to(folder).as_posix()
    try:
        inside(folder, text.relative_to(folder).as_posix(), "caption")
        caption = _caption(text)
        return Document((*_open(media, file, key), Text(caption)), source, key)
    except DocumentError as error:
        return Refusal(source, key, str(error))


def is_media(file: Path) -> bool:
    """Whether a file's ending is that of an image or a clip."""
    return file.suffix.lower() in (*EXTENSIONS, *video.EXTENSIONS)


def _open(media: Media, file: Path, key: str) -> list[Image]:
    if file.suffix.lower() in video.EXTENSIONS:
        return media.clip(key)
    return [replace(media.image(key), role=None)]


def _caption(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        what = "a link to nothing" if path.is_symlink() else "missing"
        raise DocumentError(f"no caption: {path.name} is {what}") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"caption {path.name} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise DocumentError(f"caption {path.name}: {error.strerror or error}") from error
    caption = lines[0].strip() if lines else ""
    if not caption:
        raise DocumentError(f"caption {path.name} is empty")
    return caption
