"""Views of several rows in one flat array, and which of them belong to which row.

V views, P bytes of all their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def repeat_rows(
    pixels: Tensor, sizes: Tensor, tokens: Sequence[int], wanted: Sequence[int], times: int
) -> tuple[Tensor, Tensor]:
    """Repeat the views of every row so many times, rows and views in their order.

    Args:
        pixels: uint8 [P].
        sizes: [V, 2], (height, width) of each view.
        tokens: visual tokens of each view.
        wanted: image tokens of each row; as many in all as the views make.
        times: how often each row is repeated.

    Returns:
        pixels and sizes of `times` as many rows.

    Raises:
        ValueError: a row that ends inside a view.
    """
    counts = _views_of_rows(tokens, wanted)
    heights_widths: list[list[int]] = sizes.tolist()
    ends = [0, *accumulate(3 * height * width for height, width in heights_widths)]
    bounds = [*pairwise((0, *accumulate(counts)))]
    rows = [(pixels[ends[low] : ends[high]], sizes[low:high]) for low, high in bounds]
    repeated = [row for row in rows for _ in range(times)]
    return torch.cat([row for row, _ in repeated]), torch.cat([row for _, row in repeated])


def _views_of_rows(tokens: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """How many views each row has."""
    ends = [0, *accumulate(tokens)]
    place = {end: number for number, end in enumerate(ends)}
    bounds = [0, *accumulate(wanted)]
    for row, bound in enumerate(bounds):
        if bound not in place:
            raise ValueError(
                f"row {row} has {wanted[row - 1]} image tokens and so ends inside a view"
            )
    return [place[high] - place[low] for low, high in pairwise(bounds)]
