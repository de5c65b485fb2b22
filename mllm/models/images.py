"""The images of a call, as one thing: what `Pack` and a prompt say about them.

V views, P bytes of their pixels, J and K as in `Pack`, L tokens of the longest question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Images:
    """Views and how their visual tokens stand in the text.

    Attributes:
        pixels: uint8 [P], the views of all rows one after another, each as [height, width, 3].
            None: no image.
        sizes: [V, 2], (height, width) of each view.
        order, bags: [J] and [K], which visual tokens stand at the image tokens; see `Pack`. None or
            empty: those of all views as they are made.
        asked: int64 [V, L], what is asked about each view, -1 behind its end, for connectors that
            read it. None or empty: nothing.
    """

    pixels: Tensor | None = None
    sizes: Tensor | None = None
    order: Tensor | None = None
    bags: Tensor | None = None
    asked: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.pixels is None) != (self.sizes is None):
            raise ValueError("pixels and sizes go together: give both or neither")

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> Self:
        """Take them out of a call's arguments by name."""
        return cls(**{field.name: arguments.pop(field.name, None) for field in fields(cls)})

    def by_name(self) -> Mapping[str, Tensor | None]:
        """Return them as a call's arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def views(self) -> int:
        """V."""
        return 0 if self.sizes is None else len(self.sizes)


NAMES = tuple(field.name for field in fields(Images))
