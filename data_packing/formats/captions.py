"""Captions: a folder of images, each with a text file of the same stem; its first line is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_packing.document import Document, DocumentError
from data_packing.formats.common import open_image
from data_packing.ledger import Refusal

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


def read_captions(path: Path) -> Iterator[Document | Refusal]:
    """Read image and caption pairs from a folder and the folders in it, in order of their names.

    The key is the image's path inside the folder. A text file without an image is refused too.

    Raises:
        ValueError: no such folder, or no image and no caption in it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"captions: {path} is not a folder")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    images = [file for file in files if file.suffix.lower() in EXTENSIONS]
    stems = {image.with_suffix("") for image in images}
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    alone = [text for stem, text in texts.items() if stem not in stems]
    if not images and not alone:
        raise ValueError(f"captions: no image in {path} (looked for {', '.join(EXTENSIONS)})")
    for image in images:
        key = image.relative_to(path).as_posix()
        try:
            caption = _caption(texts.get(image.with_suffix(""), image.with_suffix(".txt")))
            yield Document.caption(open_image(path, key), caption, path.name, key)
        except DocumentError as error:
            yield Refusal(path.name, key, str(error))
    for text in alone:
        key = text.relative_to(path).as_posix()
        yield Refusal(path.name, key, "a caption without an image of the same name")


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
