"""Features of regions: one more visual token of an image, the mean of those in a box.

See `standalone`, with which this becomes one file. R regions of all images; N visual tokens of the
region that has most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_packing.pack import join_questions
from mllm.export.standalone_images import token_grid
from mllm.models.geometry import Geometry, Layout
from mllm.models.regions import REGION_TOKEN, tokens_inside
from mllm.models.standing import standing


def boxes_of(conversation: Any) -> tuple[Any, list[Any]]:
    """Return it with the region token for each part that has a `box`, and the boxes.

    Args:
        conversation: messages, or several conversations.
    """
    if conversation and not isinstance(conversation[0], Mapping):
        several = [boxes_of(one) for one in conversation]
        return [turns for turns, _ in several], [box for _, boxes in several for box in boxes]
    turns: list[dict[str, Any]] = []
    boxes: list[Any] = []
    for message in conversation:
        content = message["content"]
        if not isinstance(content, str):
            boxes += [part["box"] for part in content if part.get("box") is not None]
            region = {"type": "text", "text": REGION_TOKEN}
            content = [part if part.get("box") is None else region for part in content]
        turns.append({**message, "content": content})
    return turns, boxes


def images_of_regions(texts: Iterable[str], image_token: str) -> list[int]:
    """Return the image of each region in texts, counted over all: the last one before it."""
    owners: list[int] = []
    image = -1
    for text in texts:
        before = image
        for mark in re.findall(f"{re.escape(image_token)}|{re.escape(REGION_TOKEN)}", text):
            if mark == image_token:
                image += 1
            elif image == before:
                raise ValueError(f"{REGION_TOKEN} stands before the first image of its text")
            else:
                owners.append(image)
    return owners


def region_rows(
    boxes: Sequence[Sequence[float]],
    owners: Sequence[int],
    layouts: Sequence[Layout],
    sizes: Sequence[Sequence[int]],
    geometry: Geometry,
    connector: dict[str, Any],
) -> Tensor:
    """Return int64 [R, 1 + N]: the image of a region, and which of its visual tokens it shows.

    Rows end with -1.

    Args:
        boxes: left, top, right, bottom as fractions of the image.
        owners: as `images_of_regions`.
        layouts, sizes: of the images, and what their sizes were read from.
        geometry, connector: what makes the layouts.
    """
    if len(boxes) != len(owners):
        raise ValueError(f"{len(boxes)} regions are given, the texts hold {len(owners)}")
    grid = token_grid(connector)
    firsts = [0, *accumulate(len(layout.sizes) for layout in layouts)]
    rows = []
    for (left, top, right, bottom), owner in zip(boxes, owners, strict=True):
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError("a box is left, top, right, bottom as fractions of the image")
        height, width = sizes[firsts[owner]][-2:]
        grids = [grid(geometry.grid(*size)) for size in layouts[owner].sizes]
        box = (left, top, right, bottom)
        chosen = tokens_inside(box, geometry.spans(height, width), grids)
        rows.append(np.array([owner, *chosen], dtype=np.int64))
    return join_questions(rows)


def region_means(made: Sequence[Tensor], regions: Tensor | None) -> list[Tensor]:
    """Return the features [R, D] of the regions of each image, of its visual tokens as made."""
    means = []
    for number, tokens in enumerate(made):
        rows = _regions_of(regions, number)[:, 1:].to(tokens.device)
        means.append(standing(tokens, rows[rows >= 0], (rows >= 0).sum(dim=1)))
    return means


def with_regions(layouts: Sequence[Layout], regions: Tensor | None) -> list[Layout]:
    """Return layouts of images with their regions after them, which have no places."""
    result = []
    for number, layout in enumerate(layouts):
        count = len(_regions_of(regions, number))
        order = np.arange(layout.made) if layout.order is None else layout.order
        order = np.concatenate([order, np.full(count, -1)])
        result.append(replace(layout, writing=(*layout.writing, count), order=order))
    return result


def pick_regions(regions: Tensor | None, images: Sequence[int]) -> Tensor | None:
    """Return the regions of these images, in this order."""
    if regions is None:
        return None
    picked = [_regions_of(regions, image).clone() for image in images]
    for number, rows in enumerate(picked):
        rows[:, 0] = number
    return torch.cat(picked)


def _regions_of(regions: Tensor | None, image: int) -> Tensor:
    if regions is None:
        return torch.zeros(0, 1, dtype=torch.int64)
    return regions[regions[:, 0] == image]
