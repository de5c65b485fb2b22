"""Conversations about images in LLaVA's layout (arXiv 2304.08485).

A JSON list of `{"id": …, "image": path | [paths] | absent, "conversations": [{"from": "human" |
"gpt" | "system", "value": "<image>\\n…"}, …]}`. `<image>` marks where an image goes; white space
beside it is dropped, since what separates an image from text is the template's business. Image
paths are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_packing.document import Document, DocumentError, Image, Role, Text
from data_packing.formats.common import open_image
from data_packing.ledger import Refusal

MARK = "<image>"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_llava(path: Path) -> Iterator[Document | Refusal]:
    """Read conversations in file order.

    Raises:
        ValueError: no such file, not UTF-8, not JSON, or not a list.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"llava: no file at {path}")
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"llava: {path} is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"llava: {path} is not JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"llava: {path} holds {type(records).__name__}, not a list of records")
    for number, record in enumerate(records, start=1):
        key = f"record {number}"
        try:
            if not isinstance(record, dict):
                raise DocumentError(f"a record must be an object, not {type(record).__name__}")
            if not isinstance(record.get("id"), str | int) or record["id"] == "":
                raise DocumentError('no "id"')
            key = str(record["id"])
            yield _document(record, path, key)
        except DocumentError as error:
            yield Refusal(path.stem, key, str(error))


def _document(record: dict[str, Any], path: Path, key: str) -> Document:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DocumentError('no "conversations"')
    spoken = [_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    if all(role != "assistant" for role, _ in spoken):
        raise DocumentError("nothing to learn: no turn of the assistant")
    names = record.get("image") or []
    names = names if isinstance(names, list) else [names]
    marks = sum(text.count(MARK) for _, text in spoken)
    if marks != len(names):
        raise DocumentError(f"{marks} {MARK} in the text but {len(names)} images")
    images = iter([open_image(path.parent, name) for name in names])
    content = [(role, _interleave(text, images)) for role, text in spoken]
    return Document.conversation(content, path.stem, key)


def _turn(turn: Any, number: int) -> tuple[Role, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DocumentError(f'turn {number} has no "value"')
    role = ROLES.get(str(turn.get("from")))
    if role is None:
        raise DocumentError(
            f"turn {number} is from {turn.get('from')!r}; known: {', '.join(ROLES)}"
        )
    if role != "user" and MARK in turn["value"]:
        raise DocumentError(f"turn {number}: {MARK} in a turn of the {role}")
    if role == "assistant" and not turn["value"].strip():
        raise DocumentError(f"turn {number}: the answer is empty")
    return role, turn["value"]


def _interleave(text: str, images: Iterator[Image]) -> list[Image | Text | str]:
    if MARK not in text:
        return [text]
    content: list[Image | Text | str] = []
    for number, words in enumerate(text.split(MARK)):
        if number:
            content.append(next(images))
        if words.strip():
            content.append(words.strip())
    return content
