"""Samples side by side in one row, with the bounds of the documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_packing.ledger import Refusal
from data_packing.loss_weights import EVEN, Weighting
from data_packing.sample import IGNORED, Sample


@dataclass(slots=True)
class Pack:
    """One row of T tokens made of n documents with V views of images, for K objectives.

    Attributes:
        input_ids int64 [T].
        labels int64 [T]: aligned with `input_ids`; -100 where nothing is learned, and at the first
            token of every document, which nothing before it can predict.
        weights float32 [K, T]: how much every token counts in the loss of each objective; aligned
            with `labels`, 0 where nothing is learned.
        position_ids int64 [T]: from 0 in every document.
        cu_seqlens int32 [n+1]: where documents start, and T.
        pixels uint8 [B]: of all views one after another, each as [height, width, 3].
        sizes int32 [V, 2]: (height, width) of each view; V may be 0. It stays on the CPU: the model
            needs the numbers there, and asking a GPU for them would wait for it.
        order int64 [J]: what stands at the K image tokens of `input_ids`, as places among the
            visual tokens that all views make, -1 for a newline. Empty: these as they are made.
        bags int64 [K]: how many of `order` each image token is the mean of. Empty: one.
        asked int64 [V, L]: ids of what is asked about each view, -1 behind its end. Empty: nothing.
        keys: of the documents.
        refused: documents that were planned for this pack and failed.
        number: of the pack in the plan, -1 where a rank has none.
        across_documents: whether the documents are one segment, with one pair of bounds; without
            it, one long document would look like several joined ones.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    pixels: Tensor
    sizes: Tensor
    order: Tensor
    bags: Tensor
    asked: Tensor
    keys: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    number: int = -1
    across_documents: bool = False

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Pack:
        """The pack with its tensors on a device, `sizes` excepted."""
        names = (name for name in TENSORS if name != "sizes")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return replace(self, **moved)

    @classmethod
    def empty(cls, objectives: int = 1) -> Pack:
        """The pack of a rank that has none in this micro-step: no tokens, no images."""
        return collate([], -1, weighting=Weighting(uses=((1,) * objectives,)))


TENSORS = (
    *("input_ids", "labels", "weights", "position_ids", "cu_seqlens"),
    *("pixels", "sizes", "order", "bags", "asked"),
)


class Ordered(Protocol):
    """What names visual tokens: a sample, or the row of a prompt."""

    @property
    def made(self) -> int: ...
    @property
    def order(self) -> NDArray[np.int64]: ...
    @property
    def bags(self) -> NDArray[np.int64]: ...


Empty = Callable[[int], NDArray[np.uint8]]
"""Makes an array of so many bytes."""


def plain(size: int) -> NDArray[np.uint8]:
    """An array like any other."""
    return np.empty(size, dtype=np.uint8)


def collate(
    samples: Sequence[Sample],
    number: int,
    across_documents: bool = False,
    empty: Empty = plain,
    weighting: Weighting = EVEN,
    sources: Sequence[int] = (),
) -> Pack:
    """Lay samples side by side.

    Args:
        samples: in the order of the plan.
        number: of the pack.
        across_documents: make one segment with continuous positions, in which attention and loss
            cross from document to document.
        empty: makes the array for the pixels.
        weighting: how much learned tokens count.
        sources: of the samples, as `weighting.uses` numbers them; not read where it has no table.

    Raises:
        ValueError: labels not as long as the tokens.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    for sample in samples:
        if len(sample.labels) != len(sample.input_ids):
            raise ValueError(
                f"document {sample.key!r}: {len(sample.input_ids)} tokens but "
                f"{len(sample.labels)} labels"
            )
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    total = int(ends[-1])
    labels = _joined([sample.labels for sample in samples])
    positions = [np.arange(length, dtype=np.int64) for length in lengths]
    bounds = ends
    if across_documents:
        positions = [np.arange(total, dtype=np.int64)]
        bounds = np.array([0, total] if samples else [0], dtype=np.int32)
    labels[bounds[:-1]] = IGNORED
    pixels, sizes = join_views([view for sample in samples for view in sample.pixels], empty)
    order, bags = join_orders(samples)
    return Pack(
        input_ids=torch.from_numpy(_joined([sample.input_ids for sample in samples])),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weighting.weigh(labels, ends, sources)),
        position_ids=torch.from_numpy(_joined(positions)),
        cu_seqlens=torch.from_numpy(bounds),
        pixels=pixels,
        sizes=sizes,
        order=order,
        bags=bags,
        asked=join_questions([asked for sample in samples for asked in sample.asked]),
        keys=[sample.key for sample in samples],
        number=number,
        across_documents=across_documents,
    )


def join_views(views: Sequence[NDArray[np.uint8]], empty: Empty = plain) -> tuple[Tensor, Tensor]:
    """Lay the pixels of views one after another.

    Args:
        views: uint8 [H, W, 3] each, of any sizes.
        empty: makes the array for the pixels, which are written straight into it; not called where
            there is no view.

    Returns:
        pixels uint8 [B] and sizes int32 [V, 2], (height, width) of each view.
    """
    sizes = np.array([view.shape[:2] for view in views], dtype=np.int32).reshape(-1, 2)
    pixels = empty(sum(view.size for view in views)) if views else plain(0)
    at = 0
    for view in views:
        pixels[at : at + view.size].reshape(view.shape)[...] = view
        at += view.size
    return torch.from_numpy(pixels), torch.from_numpy(sizes)


def join_orders(samples: Sequence[Ordered]) -> tuple[Tensor, Tensor]:
    """Return order [J] and bags [K] of the visual tokens of samples side by side; see `Pack`.

    Both are empty where every image token stands for what the views make, as they make it.
    """
    orders, bags, first = [], [], 0
    moved = any(len(sample.order) for sample in samples)
    bagged = any(len(sample.bags) for sample in samples)
    for sample in samples if moved else ():
        made = sample.made
        order = sample.order if len(sample.order) else np.arange(made, dtype=np.int64)
        orders.append(np.where(order < 0, order, order + first))
        if bagged:
            bags.append(sample.bags if len(sample.bags) else np.ones(len(order), dtype=np.int64))
        first += made
    return torch.from_numpy(_joined(orders)), torch.from_numpy(_joined(bags))


def join_questions(asked: Sequence[NDArray[np.int64]]) -> Tensor:
    """Return [V, L] of what is asked about each view, -1 behind its end; [0, 0] of nothing."""
    longest = max(map(len, asked), default=0)
    rows = np.full((len(asked), longest), -1, dtype=np.int64)
    for row, ids in zip(rows, asked, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(rows)


def _joined(rows: Sequence[np.ndarray]) -> np.ndarray:
    if not rows:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate(rows).astype(np.int64, copy=False)
