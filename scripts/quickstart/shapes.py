"""easy-VQA: coloured shapes with questions; the official training split only."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.quickstart.captions import Picture, held_out, kept, read_pictures, write_pictures
from scripts.quickstart.console import Advance

__all__ = ["ShapeImage", "build", "build_pages", "read"]

COLOURS = ("black", "gray", "red", "green", "blue", "teal", "brown", "yellow")
SHAPES_PER_PAGE = 8
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True, slots=True)
class ShapeImage:
    """An image of easy-VQA with its questions; colour or shape is None if nothing asks for it."""

    number: int
    data: bytes
    questions: tuple[tuple[str, str], ...]
    colour: str | None
    shape: str | None


def read(wheel: Path, split: str = "train") -> Iterator[ShapeImage]:
    """The images of a split in the order of their numbers."""
    with zipfile.ZipFile(wheel) as archive:
        folder = f"easy_vqa/data/{split}"
        asked: dict[int, list[tuple[str, str]]] = {}
        for question, answer, number in json.loads(archive.read(f"{folder}/questions.json")):
            asked.setdefault(number, []).append((question, answer))
        for number, pairs in sorted(asked.items()):
            known = _stated(pairs)
            yield ShapeImage(
                number=number,
                data=archive.read(f"{folder}/images/{number}.png"),
                questions=tuple(pairs),
                colour=next((c for c in COLOURS if c in known), None),
                shape=next((s for s in SHAPES if s in known), None),
            )


def _stated(pairs: list[tuple[str, str]]) -> set[str]:
    """The colours and shapes that answers, or questions that presuppose them, say are there."""
    words: set[str] = set()
    for question, answer in pairs:
        words.add(answer)
        if question.startswith("what"):  # "what color is the triangle?" says there is one
            words.update(question.rstrip("?").split())
    return words


def build(wheel: Path, fraction: float, folder: Path, advance: Advance) -> dict[str, Any]:
    """Write captioned shapes ("A red circle.") for machines without Debian's packages."""
    written = write_pictures(folder, _captioned(wheel, fraction))
    advance(len(written), len(written))
    hidden = sum(picture.held_out for picture in written)
    return {"pictures": len(written), "train": len(written) - hidden, "held out": hidden}


def build_pages(pictures: Path, folder: Path, advance: Advance) -> dict[str, Any]:
    """Write interleaved pages of several captioned shapes, in place of the manual.

    Args:
        pictures: the folder that `build` wrote.
    """
    known = [picture for picture in read_pictures(pictures) if not picture.held_out]
    pages = [known[at : at + SHAPES_PER_PAGE] for at in range(0, len(known), SHAPES_PER_PAGE)]
    (folder / "images").mkdir()
    with (folder / "pages.jsonl").open("w", encoding="utf-8") as output:
        for number, page in enumerate(pages):
            texts: list[str | None] = [f"Page {number + 1} shows {len(page)} shapes.\n\n"]
            images: list[str | None] = [None]
            for picture in page:
                shutil.copyfile(
                    pictures / "captions" / picture.file, folder / "images" / picture.file
                )
                texts += [None, f"{picture.caption}\n\n"]
                images += [f"images/{picture.file}", None]
            record = {"key": f"pages-{number:04d}", "texts": texts, "images": images}
            output.write(json.dumps(record) + "\n")
            advance(number + 1, len(pages))
    return {"pages": len(pages), "images": len(known)}


def _captioned(wheel: Path, fraction: float) -> Iterator[tuple[Picture, bytes]]:
    for image in read(wheel):
        key = f"shapes-{image.number:04d}"
        if image.colour and image.shape and kept(key, fraction):
            caption = f"A {image.colour} {image.shape}."
            picture = Picture(
                key=key,
                source="shapes",
                caption=caption,
                file=f"{key}.png",
                group=image.shape,
                creator="Victor Zhou",
                licence="MIT",
                held_out=held_out(caption),
            )
            yield picture, image.data
