"""Documents cut to what a pack can hold: the units that the plan deals with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_packing.index import Index
from data_packing.ledger import Refusal

ImageCost = Callable[[int, int], tuple[int, int]]
"""(height, width) of an image -> (language tokens, vision patches)."""


@dataclass(slots=True)
class Slices:
    """The units of one source, S in all: whole documents, or runs of pieces of one that is cut.

    Attributes:
        document int32 [S], start_piece, stop_piece int32 [S]: what a unit is.
        tokens, patches int64 [S]: what it takes.
        split: the documents that were cut, and how.
        split_documents: their numbers, in the same order.
        refused: the documents of which no piece fits.
        pieces_refused: pieces that fit no pack, of documents in `split`.
    """

    document: NDArray[np.int32]
    start_piece: NDArray[np.int32]
    stop_piece: NDArray[np.int32]
    tokens: NDArray[np.int64]
    patches: NDArray[np.int64]
    split: list[Refusal]
    refused: list[Refusal]
    pieces_refused: list[int]
    split_documents: list[int]

    def __len__(self) -> int:
        return len(self.document)


def cut(index: Index, image_cost: ImageCost, tokens: int, patches: int) -> Slices:
    """Cut the documents of an index so that each slice fits a pack of `tokens` and `patches`.

    A document that fits stays whole. Another is cut between pieces, each slice as long as fits. A
    piece that fits no pack is refused, and with it its document when nothing else is left.
    """
    piece_tokens, piece_patches = piece_costs(index, image_cost)
    start = index.piece_start
    token_sum, patch_sum = _running(piece_tokens), _running(piece_patches)
    total_tokens = token_sum[start[1:]] - token_sum[start[:-1]] + index.overhead
    total_patches = patch_sum[start[1:]] - patch_sum[start[:-1]]
    present = start[1:] > start[:-1]
    fits = present & (total_tokens <= tokens) & (total_patches <= patches)
    whole = np.flatnonzero(fits)
    rows: list[tuple[int, int, int, int, int]] = []
    split: list[Refusal] = []
    refused: list[Refusal] = []
    pieces_refused: list[int] = []
    split_documents: list[int] = []
    for document in np.flatnonzero(present & ~fits).tolist():
        low, high = int(start[document]), int(start[document + 1])
        own, lost = cut_one(
            piece_tokens[low:high].tolist(),
            piece_patches[low:high].tolist(),
            int(index.overhead[document]),
            tokens,
            patches,
        )
        rows.extend((document, *row) for row in own)
        if not own:
            refused.append(Refusal(index.name, index.key(document), lost[0]))
            continue
        how = [f"{len(own)} slices" if len(own) > 1 else "1 slice", *lost]
        split.append(Refusal(index.name, index.key(document), "; ".join(how)))
        pieces_refused.append(len(lost))
        split_documents.append(document)
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    stop = (start[1:] - start[:-1])[whole]
    document_column = np.concatenate([whole, table[:, 0]])
    order = np.argsort(document_column, kind="stable")

    def column(kept: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        return np.concatenate([kept, table[:, number]])[order]

    return Slices(
        document=document_column[order].astype(np.int32),
        start_piece=column(np.zeros(len(whole), dtype=np.int64), 1).astype(np.int32),
        stop_piece=column(stop, 2).astype(np.int32),
        tokens=column(total_tokens[whole], 3),
        patches=column(total_patches[whole], 4),
        split=split,
        refused=refused,
        pieces_refused=pieces_refused,
        split_documents=split_documents,
    )


def piece_costs(index: Index, image_cost: ImageCost) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens (text and images) and patches of every piece, int64 [P] each.

    `image_cost` is called once for each size that occurs.
    """
    sizes = np.stack([index.height, index.width], axis=1).astype(np.int64)
    distinct, inverse = np.unique(sizes, axis=0, return_inverse=True)
    prices = np.array([image_cost(*size) for size in distinct.tolist()], dtype=np.int64)
    prices = prices.reshape(-1, 2)[inverse.reshape(-1)]
    start = index.piece_image_start
    image_tokens, image_patches = _running(prices[:, 0]), _running(prices[:, 1])
    return (
        index.piece_text + image_tokens[start[1:]] - image_tokens[start[:-1]],
        image_patches[start[1:]] - image_patches[start[:-1]],
    )


def cut_one(
    piece_tokens: list[int],
    piece_patches: list[int],
    overhead: int,
    tokens: int,
    patches: int,
) -> tuple[list[tuple[int, int, int, int]], list[str]]:
    """Cut one document: rows of (start piece, stop piece, tokens, patches), and what is lost."""
    rows: list[tuple[int, int, int, int]] = []
    lost: list[str] = []
    first, used_tokens, used_patches = 0, overhead, 0
    for number, (text, image) in enumerate(zip(piece_tokens, piece_patches, strict=True)):
        if used_tokens + text > tokens or used_patches + image > patches:
            if number > first:
                rows.append((first, number, used_tokens, used_patches))
            first, used_tokens, used_patches = number, overhead, 0
        if overhead + text > tokens or image > patches:
            over = (
                f"{overhead + text:,} tokens, a pack holds {tokens:,}"
                if overhead + text > tokens
                else f"{image:,} vision patches, a pack holds {patches:,}"
            )
            lost.append(f"piece {number + 1} of {len(piece_tokens)} needs {over}")
            first = number + 1
            continue
        used_tokens, used_patches = used_tokens + text, used_patches + image
    if first < len(piece_tokens):
        rows.append((first, len(piece_tokens), used_tokens, used_patches))
    return rows, lost


def _running(values: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values, dtype=np.int64)])
