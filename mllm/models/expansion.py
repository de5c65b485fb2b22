"""From one placeholder per image to its visual tokens and marks, and which of them stand where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_packing.document import Document
from data_packing.sample import ImageSlot
from mllm.models.geometry import Geometry, Layout, OutputGrid, Size
from mllm.models.regions import boxes_of_images, inside

_REMEMBERED = 4096  # sizes whose layout is kept: pictures of one camera are alike
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class Expanded:
    """A row of ids with the images in their places.

    Attributes:
        ids: int64 [L].
        slots: one per image.
        order, bags: as in `Sample`.
        fillings: what stands in the place of each placeholder, images and regions in order.
        places: of the placeholders, before anything was filled in.
    """

    ids: NDArray[np.int64]
    slots: list[ImageSlot] = field(default_factory=list)
    order: NDArray[np.int64] = field(default_factory=lambda: _NONE)
    bags: NDArray[np.int64] = field(default_factory=lambda: _NONE)
    fillings: list[NDArray[np.int64]] = field(default_factory=list)
    places: NDArray[np.int64] = field(default_factory=lambda: _NONE)

    @property
    def made(self) -> int:
        """Visual tokens that the views of all images make."""
        return sum(slot.made for slot in self.slots)

    def unlearned(self, labels: NDArray[np.int64], ignored: int) -> NDArray[np.int64]:
        """Return labels [L] of the labels of the ids that were expanded."""
        nothing = [np.full(len(filling), ignored, dtype=np.int64) for filling in self.fillings]
        return _filled(labels, self.places, nothing)


class Expander:
    """Fills images in.

    Args:
        geometry: how an image becomes views.
        output_grid: what the connector makes of a view's grid.
        image_id: the token of a visual token.
        region_id: the placeholder of a region's feature; None where there is none.
        ids_of: the ids of a mark.
        standing: what stands in the text for an image of a layout; see `Fusion.layout`.
    """

    def __init__(
        self,
        geometry: Geometry,
        output_grid: OutputGrid,
        image_id: int,
        region_id: int | None,
        ids_of: Callable[[str], list[int]],
        standing: Callable[[Layout], Layout],
    ) -> None:
        self.geometry, self.output_grid = geometry, output_grid
        self.image_id, self.region_id, self.ids_of = image_id, region_id, ids_of
        self.standing = standing
        self._layouts: dict[Size, Layout] = {}
        self._marks: dict[str, list[int]] = {}

    def layout(self, height: int, width: int) -> Layout:
        """Return the views and the visual tokens of an image of this size in pixels."""
        if (height, width) not in self._layouts:
            if len(self._layouts) == _REMEMBERED:
                self._layouts.clear()
            layout = self.geometry.layout(height, width, self.output_grid)
            self._layouts[height, width] = self.standing(layout)
        return self._layouts[height, width]

    def tokens(self, height: int, width: int) -> int:
        """Return how many tokens an image of this size takes, its marks included."""
        layout = self.layout(height, width)
        return layout.tokens + sum(len(self._mark(text)) for text in layout.marks)

    def expand(self, ids: NDArray[np.int64], document: Document) -> Expanded:
        """Put its visual tokens and marks into the place of every image."""
        is_image, boxes = ids == self.image_id, []
        placeholders = is_image
        if self.region_id is not None:
            placeholders = is_image | (ids == self.region_id)
            boxes = boxes_of_images(document)
        result = Expanded(ids, places=np.flatnonzero(placeholders))
        layouts = [self.layout(image.height, image.width) for image in document.images]
        firsts = [*accumulate((layout.made for layout in layouts), initial=0)]
        images, regions = iter(range(len(layouts))), iter(boxes)
        orders: list[NDArray[np.int64]] = []
        bags: list[NDArray[np.int64]] = []
        grown = 0
        for place in result.places.tolist():
            if is_image[place]:
                number = next(images)
                layout = layouts[number]
                filling = self._filling(layout)
                result.slots.append(_slot(place + grown, len(filling), layout))
                orders.append(_moved(layout, firsts[number]))
                bags.append(_bags(layout, len(orders[-1])))
            else:
                number, box = next(regions)
                image = document.images[number]
                filling = np.array([self.image_id], dtype=np.int64)
                chosen = inside(box, image.height, image.width, self.geometry, self.output_grid)
                orders.append(chosen + firsts[number])
                bags.append(np.array([len(chosen)]))
            result.fillings.append(filling)
            grown += len(filling) - 1
        shared = any(len(made) < len(named) for made, named in zip(bags, orders, strict=True))
        if shared or boxes or any(layout.order is not None for layout in layouts):
            result.order = np.concatenate(orders)
        if shared or boxes:
            result.bags = np.concatenate(bags)
        result.ids = _filled(ids, result.places, result.fillings)
        return result

    def _filling(self, layout: Layout) -> NDArray[np.int64]:
        """Ids of what stands in an image's slot."""
        pieces = [
            [self.image_id] * piece if isinstance(piece, int) else self._mark(piece)
            for piece in layout.writing
        ]
        return np.array([token for piece in pieces for token in piece], dtype=np.int64)

    def _mark(self, text: str) -> list[int]:
        """Ids of a mark between visual tokens."""
        if text not in self._marks:
            self._marks[text] = self.ids_of(text)
        return self._marks[text]


def _slot(start: int, length: int, layout: Layout) -> ImageSlot:
    return ImageSlot(start, length, layout.grid, len(layout.sizes), layout.made)


def _moved(layout: Layout, first: int) -> NDArray[np.int64]:
    """The order of an image's visual tokens among those of all images of its document."""
    order = np.arange(layout.made, dtype=np.int64) if layout.order is None else layout.order
    return np.where(order < 0, order, order + first)


def _bags(layout: Layout, named: int) -> NDArray[np.int64]:
    """How many of the named visual tokens each of an image's tokens in the text stands for."""
    if layout.tokens == named:
        return np.ones(named, dtype=np.int64)
    assert layout.tokens == 1
    return np.array([named], dtype=np.int64)


def _filled(
    values: NDArray[np.int64], places: NDArray[np.int64], fillings: Sequence[NDArray[Any]]
) -> NDArray[np.int64]:
    """Return values with a filling in the place of each of these."""
    if not len(places):
        return values
    texts = np.split(values, places)
    rest = [
        part
        for filling, text in zip(fillings, texts[1:], strict=True)
        for part in (filling, text[1:])
    ]
    return np.concatenate([texts[0], *rest])
