"""Regions of an image in the text: a box as numbers, or as the feature of what it shows.

As numbers a box is text like any other, which a model can also learn to write. As a feature it is
one more visual token: the mean of the image's visual tokens whose places lie in the box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data_packing.document import Box, Document, Image, Text
from mllm.models.geometry import Geometry, OutputGrid, Span

REGION_TOKEN = "<region>"
STYLES = ("decimals", "thousandths", "feature")


def spelled(box: Box, style: str) -> str:
    """Return what stands for a box in the text.

    Args:
        box: left, top, right, bottom as fractions of the image.
        style: "decimals" is Shikra's `[0.125,0.300,0.500,0.750]` (Chen et al. 2023, arXiv
            2306.15195, section 3), "thousandths" `[125, 300, 500, 750]` as InternVL and Qwen3-VL
            count, "feature" the token whose place a feature takes.
    """
    if style == "feature":
        return REGION_TOKEN
    if style == "thousandths":
        return f"[{', '.join(str(round(1000 * side)) for side in box)}]"
    return f"[{','.join(f'{side:.3f}' for side in box)}]"


def with_boxes(document: Document, style: str) -> Document:
    """Write the boxes of a document; a feature is not learned, for nothing could produce it."""
    parts = tuple(
        replace(part, text=spelled(part.box, style), learned=part.learned and style != "feature")
        if isinstance(part, Text) and part.box is not None
        else part
        for part in document.parts
    )
    return replace(document, parts=parts)


def boxes_of_images(document: Document) -> list[tuple[int, Box]]:
    """Return the boxes in order, each with the number of its image."""
    found, image = [], -1
    for part in document.parts:
        if isinstance(part, Image):
            image += 1
        elif part.box is not None:
            found.append((image, part.box))
    return found


def inside(
    box: Box, height: int, width: int, geometry: Geometry, output_grid: OutputGrid
) -> NDArray[np.int64]:
    """Return which of an image's visual tokens, as its views make them, lie in a box."""
    sizes = geometry.view_sizes(height, width)
    grids = [output_grid(geometry.grid(*size)) for size in sizes]
    return tokens_inside(box, geometry.spans(height, width), grids)


def tokens_inside(
    box: Box, spans: Sequence[Span], grids: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """Return which of the visual tokens of views, (rows, columns) of each span, lie in a box.

    A token counts where its middle does; where none does, the one whose middle is nearest.
    """
    middles = np.concatenate([*map(_middles, spans, grids)])
    left, top, right, bottom = box
    x, y = middles[:, 0], middles[:, 1]
    found = np.flatnonzero((left <= x) & (x < right) & (top <= y) & (y < bottom))
    if len(found):
        return found.astype(np.int64)
    away = np.hypot(x - (left + right) / 2, y - (top + bottom) / 2)
    return np.array([away.argmin()], dtype=np.int64)


def has_places(grids: Sequence[tuple[int, int]]) -> bool:
    """Return whether visual tokens of these grids have places in the image."""
    return all(rows > 1 or columns == 1 for rows, columns in grids)


def _middles(span: Span, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Middles [rows x columns, 2], (x, y), of the cells that a view's span is divided into."""
    left, top, right, bottom = span
    rows, columns = grid
    y = top + (bottom - top) * (np.arange(rows) + 0.5) / rows
    x = left + (right - left) * (np.arange(columns) + 0.5) / columns
    across, down = np.meshgrid(x, y)
    return np.stack([across.reshape(-1), down.reshape(-1)], axis=1)
