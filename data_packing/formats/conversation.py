"""From the turns of a conversation, as people write them, to the parts of a document.

A turn is an object with a role (`from` or `role`) and what is said (`value` or `content`): a text,
or OpenAI's list of content parts. `<image>` and `<video>` in a text mark where the images and clips
of the record go; white space beside them is dropped, since what separates an image from text is the
template's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from data_packing.document import DocumentError, Part, Role, Text
from data_packing.formats.boxes import Boxes
from data_packing.formats.common import shown
from data_packing.formats.media import Media
from data_packing.wording import counted

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")
UNREAD = {
    "audio": "audio",
    "audios": "audio",
    "tools": "descriptions of tools",
    "rejected": "a rejected answer (preference data)",
    "rejected_response": "a rejected answer (preference data)",
    "rejected_messages": "a rejected answer (preference data)",
    "rejected_images": "a rejected image (preference data)",
}
"""Columns that would change what the record teaches, and that nothing here reads."""

_MARKS = re.compile(r"<(image|video)>")
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_VIDEO_TYPES = ("video", "video_url", "input_video")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a turn: a text, or an image or clip.

    Attributes:
        kind: "text", "image" or "video".
        value: the text, or what says where the image is; None takes the record's next one.
    """

    kind: str
    value: Any = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says at one time."""

    role: Role
    pieces: tuple[Piece, ...]
    learned: bool


def say(role: Role, text: str) -> Turn:
    """A turn from its text, with the marks in it found."""
    return Turn(role, tuple(_marked(text)), role == "assistant")


def read_turns(turns: Any, column: str) -> list[Turn]:
    """Read a list of turns.

    Raises:
        DocumentError: no turns, or one that cannot be used, with its number.
    """
    if not isinstance(turns, list) or not turns:
        raise DocumentError(f'no "{column}"')
    return [_turn(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]


def pair(asked: Any, answered: Any, place: str) -> list[Turn]:
    """The two turns of a question and its answer.

    Raises:
        DocumentError: one is no text, or the answer is empty.
    """
    for what, text in (("question", asked), ("answer", answered)):
        if not isinstance(text, str):
            raise DocumentError(f"{place}: the {what} must be a text, not {shown(repr(text))}")
    turns = [say("user", asked), say("assistant", answered)]
    for turn in turns:
        _check(turn, place)
    return turns


def converse(
    turns: Sequence[Turn], record: dict[str, Any], media: Media, leading: bool = False
) -> list[Part]:
    """Put the record's images and clips where the turns mark them.

    Args:
        turns: who says what.
        record: the row, for its columns `image`, `images`, `video` and `videos`.
        media: opens what the columns name.
        leading: images that no mark places go to the start of the first turn of the user.

    Raises:
        DocumentError: nothing to learn, marks and images differ in number, an image is unusable,
            or a column holds what is not read.
    """
    for column, what in UNREAD.items():
        if record.get(column) and record[column] != "[]":
            raise DocumentError(f'"{column}": {what} cannot be read')
    if not any(turn.learned for turn in turns):
        raise DocumentError("nothing to learn: no turn of the assistant")
    waiting = {
        "image": listed(record, "image", "images"),
        "video": listed(record, "video", "videos"),
    }
    placed = _placed(list(turns), waiting, leading)
    queues: dict[str, Iterator[Any]] = {kind: iter(values) for kind, values in waiting.items()}
    queues["clip number"] = count(1)
    parts = (part for turn in placed for part in _parts(turn, queues, media))
    return list(Boxes(record).place(parts))


def listed(record: dict[str, Any], one: str, many: str) -> list[Any]:
    """What a record gives in the column for one or in the column for many, without nulls.

    Raises:
        DocumentError: both columns are filled, and differ.
    """
    found = []
    for column in (one, many):
        value = record.get(column)
        values = value if isinstance(value, list) else [value]
        found.append([item for item in values if item is not None and item != ""])
    if found[0] and found[1] and found[0] != found[1]:
        raise DocumentError(f'both "{one}" and "{many}" are filled, and differ')
    return found[0] or found[1]


def _turn(turn: Any, place: str) -> Turn:
    said = "content" if isinstance(turn, dict) and "role" in turn else "value"
    if not isinstance(turn, dict):
        raise DocumentError(f'{place} has no "{said}": it is {shown(repr(turn))}')
    name = turn.get("role") if said == "content" else turn.get("from")
    role = ROLES.get(str(name).lower())
    if turn.get("tool_calls") or turn.get("function_call") or str(name).lower() in TOOL_ROLES:
        raise DocumentError(f"{place} is from {shown(repr(name))}: calls of tools cannot be read")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if not isinstance(content, str | list):
        raise DocumentError(f'{place} has no "{said}"')
    if role is None:
        raise DocumentError(f"{place} is from {shown(repr(name))}; known: {', '.join(ROLES)}")
    pieces = _marked(content) if isinstance(content, str) else _content(content, place)
    learned = role == "assistant" and turn.get("loss") not in (False, 0, 0.0)
    spoken = Turn(role, tuple(pieces), learned)
    _check(spoken, place)
    return spoken


def _check(turn: Turn, place: str) -> None:
    for piece in turn.pieces:
        if turn.role != "user" and piece.kind != "text":
            raise DocumentError(f"{place}: <{piece.kind}> in a turn of the {turn.role}")
    if turn.role == "assistant" and not any(piece.value.strip() for piece in turn.pieces):
        raise DocumentError(f"{place}: the answer is empty")


def _marked(text: str) -> Iterator[Piece]:
    for number, words in enumerate(_MARKS.split(text)):
        yield Piece(words) if number % 2 else Piece("text", words)


def _content(content: list[Any], place: str) -> Iterator[Piece]:
    """The pieces of OpenAI's list of content parts; neighbouring texts become one."""
    for number, part in enumerate(content, start=1):
        if isinstance(part, str):
            yield from _marked(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_TYPES and isinstance(part.get("text"), str):
            yield from _marked(part["text"])
        elif kind in _IMAGE_TYPES or kind in _VIDEO_TYPES:
            what = "image" if kind in _IMAGE_TYPES else "video"
            names = (kind, f"{what}_url", what, "url", "path", "bytes")
            held = next((part[name] for name in names if part.get(name)), None)
            yield Piece(what, held)
        else:
            raise DocumentError(
                f"{place}: part {number} of its content is {shown(repr(part))}; known types: "
                f"{', '.join((*_TEXT_TYPES, *_IMAGE_TYPES, *_VIDEO_TYPES))}"
            )


def _placed(turns: list[Turn], waiting: dict[str, list[Any]], leading: bool) -> list[Turn]:
    """The turns with exactly as many marks as there are images and clips."""
    marks = {kind: _count(turns, kind) for kind in waiting}
    if not waiting["image"] and not marks["video"] and marks["image"] == len(waiting["video"]):
        turns = [_as_clips(turn) for turn in turns]  # as LLaVA-Video marks its clips
        marks = {"image": 0, "video": marks["image"]}
    for kind, values in waiting.items():
        if leading and values and not marks[kind]:
            turns = _in_front(turns, [Piece(kind)] * len(values))
        elif marks[kind] != len(values):
            raise DocumentError(
                f"{marks[kind]} <{kind}> in the text but {counted(len(values), kind)}"
            )
    return turns


def _count(turns: list[Turn], kind: str) -> int:
    return sum(p.kind == kind and p.value is None for turn in turns for p in turn.pieces)


def _as_clips(turn: Turn) -> Turn:
    pieces = (
        Piece("video") if piece.kind == "image" and piece.value is None else piece
        for piece in turn.pieces
    )
    return Turn(turn.role, tuple(pieces), turn.learned)


def _in_front(turns: list[Turn], pieces: list[Piece]) -> list[Turn]:
    for number, turn in enumerate(turns):
        if turn.role == "user":
            with_images = Turn("user", (*pieces, *turn.pieces), turn.learned)
            return [*turns[:number], with_images, *turns[number + 1 :]]
    raise DocumentError("images, but no turn of the user to show them in")


def _parts(turn: Turn, queues: dict[str, Iterator[Any]], media: Media) -> Iterator[Part]:
    has_media = any(piece.kind != "text" for piece in turn.pieces)
    text = ""
    for piece in (*turn.pieces, Piece("end")):
        if piece.kind == "text":
            text += piece.value
            continue
        words = text.strip() if has_media else text
        if words or not has_media:
            yield Text(words, turn.role, turn.learned)
        text = ""
        if piece.kind == "end":
            return
        value = next(queues[piece.kind]) if piece.value is None else piece.value
        if piece.kind == "image":
            yield media.image(value, turn.role)
        else:
            yield from media.clip(value, turn.role, next(queues["clip number"]))
