"""The turns of a conversation, as a chat template is handed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from data_packing.document import Document, DocumentError, Image


@dataclass(slots=True)
class Turn:
    """Neighbouring parts of one role.

    Attributes:
        role: who has it.
        parts: its texts in order, None for an image.
        learned: whether its texts are learned; both, where some are.
        first_part: where it begins in the document.
    """

    role: str
    parts: list[str | None] = field(default_factory=list)
    learned: set[bool] = field(default_factory=set)
    first_part: int = 0

    def as_text(self, image: str) -> str:
        """The content in one string."""
        return "".join(image if part is None else part for part in self.parts)

    def as_parts(self) -> list[dict[str, str]]:
        """The content as transformers' processors take it, neighbouring texts joined."""
        joined: list[dict[str, str]] = []
        for part in self.parts:
            if part is None:
                joined.append({"type": "image"})
            elif joined and joined[-1]["type"] == "text":
                joined[-1]["text"] += part
            else:
                joined.append({"type": "text", "text": part})
        return joined


def turns_of(document: Document) -> list[Turn]:
    """Join neighbouring parts of one role into turns.

    Raises:
        DocumentError: an answer that is learned in part.
    """
    turns: list[Turn] = []
    for number, part in enumerate(document.parts):
        assert part.role is not None
        if not turns or turns[-1].role != part.role:
            turns.append(Turn(part.role, first_part=number))
        turn = turns[-1]
        if isinstance(part, Image):
            turn.parts.append(None)
        else:
            turn.parts.append(part.text)
            turn.learned.add(part.learned)
    for turn in turns:
        if turn.role == "assistant" and len(turn.learned) > 1:
            raise DocumentError("an answer is learned as a whole or not at all")
    return turns


def questions(document: Document) -> list[str]:
    """Return for each image what is asked in the turn that shows it; nothing in a raw document.

    Only texts that are not learned count: an answer must not be seen before it is given.
    """
    return asked_about(
        [
            (part.role, None if isinstance(part, Image) else "" if part.learned else part.text)
            for part in document.parts
        ]
    )


def asked_about(parts: Sequence[tuple[str | None, str | None]]) -> list[str]:
    """Return for each image what is said in the turn that shows it; nothing without a role.

    Args:
        parts: role and text, None for an image.
    """
    found: list[str] = []
    for role, run in groupby(parts, key=lambda part: part[0]):
        texts = [text for _, text in run]
        asked = "" if role is None else "".join(text for text in texts if text is not None)
        found += [asked for text in texts if text is None]
    return found
