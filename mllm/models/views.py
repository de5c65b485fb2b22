"""Views of several rows in one flat array, and which of them belong to which row.

V views, P bytes of all their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mllm.models.images import Images


def repeat_rows(images: Images, tokens: Sequence[int], wanted: Sequence[int], times: int) -> Images:
    """Repeat the views of every row so many times, rows and views in their order.

    Args:
        images: of all rows; there is at least one.
        tokens: visual tokens that each view makes.
        wanted: image tokens of each row.
        times: how often each row is repeated.

    Raises:
        ValueError: a row that ends inside a view.
    """
    assert images.pixels is not None
    assert images.sizes is not None
    order, bags, asked = images.order, images.bags, images.asked
    named = wanted  # places in `order` of each row
    if bags is not None:
        named = [int(row.sum()) for row in bags.split([*wanted])]
        bags = torch.cat([row for row in bags.split([*wanted]) for _ in range(times)])
    made = wanted if order is None else _made(order, named, sum(tokens))
    counts = _views_of_rows(tokens, made)
    heights_widths: list[list[int]] = images.sizes.tolist()
    ends = [0, *accumulate(3 * height * width for height, width in heights_widths)]
    bounds = [span for span in pairwise((0, *accumulate(counts))) for _ in range(times)]
    if order is not None:
        order = _repeat_order(order, named, made, times)
    if asked is not None:
        asked = torch.cat([asked[low:high] for low, high in bounds])
    return Images(
        torch.cat([images.pixels[ends[low] : ends[high]] for low, high in bounds]),
        torch.cat([images.sizes[low:high] for low, high in bounds]),
        order,
        bags,
        asked,
    )


def _made(order: Tensor, named: Sequence[int], total: int) -> list[int]:
    """How many visual tokens the views of each row make; the first view of an image is whole."""
    starts = [int(row[row >= 0].min()) if len(row) else -1 for row in order.split([*named])]
    made, after = [0] * len(starts), total
    for number in reversed(range(len(starts))):
        if starts[number] >= 0:
            made[number], after = after - starts[number], starts[number]
    return made


def _repeat_order(order: Tensor, named: Sequence[int], made: Sequence[int], times: int) -> Tensor:
    rows, before, first = [], 0, 0
    for row, count in zip(order.split([*named]), made, strict=True):
        for _ in range(times):
            rows.append(torch.where(row < 0, row, row - before + first))
            first += count
        before += count
    return torch.cat(rows)


def _views_of_rows(tokens: Sequence[int], made: Sequence[int]) -> list[int]:
    """How many views each row has."""
    ends = [0, *accumulate(tokens)]
    place = {end: number for number, end in enumerate(ends)}
    bounds = [0, *accumulate(made)]
    for row, bound in enumerate(bounds):
        if bound not in place:
            raise ValueError(
                f"row {row} has {made[row - 1]} image tokens and so ends inside a view"
            )
    return [place[high] - place[low] for low, high in pairwise(bounds)]
