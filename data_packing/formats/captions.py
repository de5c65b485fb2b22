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


def read_captions(path: Path, options: Options = DEFAULT) -> Iterator[Draft]:
    """Read pairs from a folder and the folders in it, in order of their names.

    The key is the path of the image or clip inside the folder. A text file without one is refused
    too.

    Raises:
        ValueError: no such folder, or no image, clip or caption in it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"captions: {path} is not a folder")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    shown = [file for file in files if is_media(file)]
    stems = {file.with_suffix("") for file in shown}
    texts: dict[Path, Path] = {}
    alone: list[tuple[Path, str]] = []
    for file in reversed(files):  # a.txt before a.TXT
        if file.suffix.lower() != ".txt":
            continue
        if file.with_suffix("") not in stems:
            alone.append((file, "a caption without an image of the same name"))
        elif texts.setdefault(file.with_suffix(""), file) != file:
            alone.append((file, f"a second caption beside {texts[file.with_suffix('')].name}"))
    if not shown and not alone:
        raise ValueError(f"captions: no image in {path} (looked for {', '.join(EXTENSIONS)})")
    source, media = source_name(path), Media(path, options.frames)
    for file in shown:
        text = texts.get(file.with_suffix(""), file.with_suffix(".txt"))
        yield partial(_document, path, file, text, media, source)
    for file, reason in reversed(alone):
        yield refused(source, file.relative_to(path).as_posix(), reason)


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
        raise DocumentError(f"no caption: {path.name} is missing") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"caption {path.name} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise DocumentError(f"caption {path.name}: {error.strerror or error}") from error
    caption = lines[0].strip() if lines else ""
    if not caption:
        raise DocumentError(f"caption {path.name} is empty")
    return caption
