"""Video as frames with a budget of tokens.

A clip is a document's consecutive images of one number (`Image.clip`). Frames that its budget does
not pay for are left out, evenly, before anything is written: so a clip costs what its budget says
at most, and always shows at least one frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

from data_packing.document import Document, Image, Part

FrameCost = Callable[[Image], int]


def thinned(document: Document, budget: int, cost: FrameCost) -> tuple[Document, list[int]]:
    """Leave out the frames that a clip's budget does not pay for.

    Args:
        document: as written.
        budget: visual tokens of a clip.
        cost: tokens of a frame.

    Returns:
        The document, and which of its images were kept, by number.
    """
    parts: list[Part] = []
    kept: list[int] = []
    images = 0
    for clip, run in groupby(document.parts, key=_clip):
        members = list(run)
        if clip:
            shown = _chosen([part for part in members if isinstance(part, Image)], budget, cost)
            parts += [members[place] for place in shown]
            kept += [images + place for place in shown]
            images += len(members)
        else:
            for part in members:
                if isinstance(part, Image):
                    kept.append(images)
                    images += 1
            parts += members
    return replace(document, parts=tuple(parts)), kept


def _clip(part: Part) -> int:
    return part.clip if isinstance(part, Image) else 0


def _chosen(frames: list[Image], budget: int, cost: FrameCost) -> list[int]:
    """The middles of as many equal stretches as the dearest frame leaves room for."""
    room = max(1, min(len(frames), budget // max(map(cost, frames))))
    return [(2 * part + 1) * len(frames) // (2 * room) for part in range(room)]
