"""Conversations about pictures whose answers are true by the metadata.

What is it, where does it belong, is it taller than a metre, what is it called in another language;
and a slice of easy-VQA. Questions are phrased in several ways; seeds are fixed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.quickstart.captions import Picture, kept, read_pictures
from scripts.quickstart.console import Advance
from scripts.quickstart.shapes import ShapeImage, read

__all__ = ["QUESTIONS", "build", "conversation", "questions_file"]

QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": (
        "What is this?",
        "What is shown in the picture?",
        "What do you see here?",
        "Name what the image shows.",
        "Can you tell me what this is?",
    ),
    "category": (
        "Which furniture category does it belong to?",
        "In which category of the furniture catalogue would you look for this?",
        "What category is this piece in?",
        "Name the catalogue category of this object.",
    ),
    "room": (
        "Which room does it belong to?",
        "In which room would you put this?",
        "Where in a home does this belong?",
    ),
    "tall": (
        "Is it taller than one metre?",
        "Is the real object more than a metre high?",
        "Would it stand higher than one metre?",
    ),
    "group": (
        "What kind of thing is it?",
        "Which group does it belong to?",
        "What sort of picture is this?",
    ),
    "language": (
        "What is it called in {language}?",
        "How do you say that in {language}?",
        "Name it in {language}.",
    ),
}
"""Ways to ask, by what is asked; the first of each is the one to evaluate with."""

LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish"}
ROOMS = ("Bathroom", "Bedroom", "Kitchen", "Living room", "Office")
GROUPS = {
    "animals": "Animal",
    "clothes": "Clothes",
    "food": "Food",
    "household": "Household item",
    "people": "People",
    "plants": "Plant",
    "space": "Space",
    "sports": "Sports",
    "town": "Town",
    "vehicles": "Vehicle",
}
METRE_CM = 100.0
SHAPE_IMAGES = 160
SHAPE_TURNS = 3
FURTHER_SHARE = 0.5

Turn = tuple[str, str]


def build(
    pictures: Iterable[Path], wheel: Path, fraction: float, folder: Path, advance: Advance
) -> dict[str, Any]:
    """Write conversations.json and images/ to `folder`; returns counts.

    Args:
        pictures: folders that `write_pictures` made.
        wheel: the easy-VQA package.
    """
    (folder / "images").mkdir()
    records: list[dict[str, Any]] = []
    counts: dict[str, Any] = {}
    known = [(place, picture) for place in pictures for picture in read_pictures(place)]
    for number, (place, picture) in enumerate(known):
        advance(number, len(known))
        if picture.held_out or picture.source == "shapes":
            continue
        _link(place / "captions" / picture.file, folder / "images" / picture.file)
        rounds = (0, 1) if picture.category else (number % 2,)
        for which in rounds:
            turns = conversation(picture, which)
            records.append(_record(f"{picture.key}-{which}", picture.file, turns))
            counts[picture.source] = counts.get(picture.source, 0) + 1
    for image in _shape_slice(wheel, fraction):
        name = f"shapes-{image.number:04d}.png"
        (folder / "images" / name).write_bytes(image.data)
        records.append(_record(name.removesuffix(".png"), name, _shape_turns(image)))
        counts["easy_vqa"] = counts.get("easy_vqa", 0) + 1
    (folder / "conversations.json").write_text(
        json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    turns_total = sum(len(record["conversations"]) // 2 for record in records)
    return {"conversations": len(records), "answers": turns_total, **counts}


def conversation(picture: Picture, which: int) -> list[Turn]:
    """Question and answer turns about a picture; another `which` gives other phrasings.

    An even `which` asks for the kind alone: whoever is told the name first need not look at the
    picture for the kind. An odd one asks for name and kind in either order, and half of the time
    one thing more. Conversations are short, because every answer has to pay for the turns before.
    """
    rng = random.Random(f"{picture.key}:{which}")
    kind = _kind(picture, rng)
    if kind and which % 2 == 0:
        return kind
    turns = [*kind, (rng.choice(QUESTIONS["name"]), picture.caption)]
    rng.shuffle(turns)
    further = _further(picture, rng)
    return [*turns, rng.choice(further)] if further and rng.random() < FURTHER_SHARE else turns


def _kind(picture: Picture, rng: random.Random) -> list[Turn]:
    """What kind of thing it is: a turn, or none."""
    if picture.category:
        return [(rng.choice(QUESTIONS["category"]), picture.category)]
    if picture.group in GROUPS:
        return [(rng.choice(QUESTIONS["group"]), GROUPS[picture.group])]
    return []


def _further(picture: Picture, rng: random.Random) -> list[Turn]:
    """Whatever else is known of it."""
    turns: list[Turn] = []
    if picture.category in ROOMS:
        turns.append((rng.choice(QUESTIONS["room"]), str(picture.category)))
    if picture.height_cm:
        answer = "Yes" if picture.height_cm > METRE_CM else "No"
        turns.append((rng.choice(QUESTIONS["tall"]), answer))
    if picture.names:
        code = rng.choice(sorted(picture.names))
        question = rng.choice(QUESTIONS["language"]).format(language=LANGUAGES[code])
        turns.append((question, picture.names[code]))
    return turns


def questions_file(pictures: Iterable[Picture]) -> dict[str, Any]:
    """What to ask in an evaluation, and the answers to choose from."""
    return {
        "questions": QUESTIONS,
        "categories": sorted({picture.category for picture in pictures if picture.category}),
        "rooms": ROOMS,
        "groups": GROUPS,
        "languages": LANGUAGES,
    }


def _shape_slice(wheel: Path, fraction: float) -> list[ShapeImage]:
    images = [image for image in read(wheel) if kept(f"shapes-{image.number:04d}", fraction)]
    return images[: max(1, round(SHAPE_IMAGES * fraction))]


def _shape_turns(image: ShapeImage) -> list[Turn]:
    rng = random.Random(image.number)
    chosen = rng.sample(image.questions, min(SHAPE_TURNS, len(image.questions)))
    return [(question.capitalize(), answer.capitalize()) for question, answer in chosen]


def _record(key: str, image: str, turns: list[Turn]) -> dict[str, Any]:
    messages = []
    for number, (question, answer) in enumerate(turns):
        asked = f"<image>\n{question}" if number == 0 else question
        messages.append({"from": "human", "value": asked})
        messages.append({"from": "gpt", "value": answer})
    return {"id": key, "image": f"images/{image}", "conversations": messages}


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the file system cannot link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
