"""A document after the processor, and what a document costs. The second of the four nouns.

Arrays are NumPy: samples cross from loader workers to the training process, and planning code that
only reads `Cost` must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""The label of a token that is not learned."""


@dataclass(slots=True)
class ImageSlot:
    """Where one image sits in the sequence.

    Attributes:
        start: position of its first token in `Sample.input_ids`.
        length: how many tokens it takes, marks between its visual tokens included.
        grid: (rows, columns) of its visual tokens, (1, all of them) where they make no grid.
        views: how many views it became; the next ones in `Sample.pixels` are its own.
        made: visual tokens that these views make; 0: as many as the slot takes.
        image: which of the document's images it is, None: the next one. Frames of a clip may be
            left out.
    """

    start: int
    length: int
    grid: tuple[int, int]
    views: int = 1
    made: int = 0
    image: int | None = None


@dataclass(slots=True)
class Sample:
    """One document as the model sees it.

    A view is one thing that the encoder encodes; an image becomes one or several.

    Attributes:
        input_ids: int64 [L].
        labels: int64 [L], aligned with `input_ids` (not shifted); -100 where nothing is learned.
        slots: one per image, in order.
        pixels: one uint8 [H, W, 3] per view, of any sizes, in order.
        targets: further targets by name, for objectives other than language modelling.
        source, key: where the document came from.
        order, bags: int64 [J] and [K], what stands at its K image tokens; see `Pack`. Empty where
            that is what the views make, as they make it.
        asked: int64 ids of what is asked about each view, for models that look at images with it;
            else empty.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    slots: list[ImageSlot] = field(default_factory=list)
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    targets: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    key: str = ""
    order: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    bags: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    asked: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def made(self) -> int:
        """Visual tokens that its views make."""
        return sum(slot.made or slot.length for slot in self.slots)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a document costs in text tokens; what its images cost is computed from their size.

    Attributes:
        overhead: tokens that every slice of the document pays (begin token, system prompt, end
            token).
        pieces: for each of `Document.pieces()`: (text tokens, indices of its images). Every image
            of the document stands in one of them, in order, but frames that `encode` leaves out;
            of each clip at least one is kept.
    """

    overhead: int
    pieces: tuple[tuple[int, tuple[int, ...]], ...]
