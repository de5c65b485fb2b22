"""Images whose tokens see each other in both directions, as in PaliGemma and Gemma 3.

A language model that sees the past alone shows the first token of an image nothing of the others.
Gemma 3 (arXiv 2503.19786, transformers' implementation) opens the mask inside each image: a token
of it also sees the later tokens of the same image, in full and in sliding layers. What came before
is seen as ever, as far as the layer's window.

Shapes: B rows (1 in a pack), T tokens of a row, S keys (T and what is cached), L of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which tokens are one image.

    Attributes:
        numbers: int64 [B, T], 0 for text, the same number for all tokens of an image.
        documents: of a pack, whether each document has an image; empty for ordinary rows.
    """

    numbers: Tensor
    documents: tuple[bool, ...] = ()

    def later(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return what of a stretch is later in the same image, bool [B, 1, L, L]."""
        numbers = self.numbers[:, start:stop]
        same = (numbers[:, :, None] == numbers[:, None]) & (numbers > 0)[:, :, None]
        return same.triu(1)[:, None]

    def opened(self, mask: Tensor | None, keys: int) -> Tensor:
        """Return the mask [B, 1, T, S] of ordinary rows, opened inside images.

        Args:
            mask: what is seen without images, bool, broadcast to [B, 1, T, S]. None: the past.
            keys: S; the tokens of this call are the last ones.
        """
        tokens = self.numbers.shape[1]
        if mask is None:
            ones = torch.ones(tokens, keys, dtype=torch.bool, device=self.numbers.device)
            mask = ones.tril(keys - tokens)[None, None]
        return mask | functional.pad(self.later(), (keys - tokens, 0))


def what_attention_is_told(
    config: Any, input_ids: Tensor | None, bounds: Sequence[int] | None, cache: Cache | None = None
) -> dict[str, Blocks]:
    """Return what a call hands down to attention; nothing for models whose images see the past.

    Args:
        config: of our model.
        input_ids: [B, T].
        bounds: of the documents of a pack.
        cache: what the call adds to.

    Raises:
        ValueError: a call that does not say which tokens are images, or a cache of fixed length.
    """
    if not config.bidirectional_images:
        return {}
    if input_ids is None:
        raise ValueError(
            "inputs_embeds do not say which tokens are one image, and this model's images see "
            "themselves in both directions: give input_ids"
        )
    blocks = image_blocks(input_ids == config.image_token_id, bounds)
    if blocks is not None and cache is not None and cache.is_compileable:
        raise ValueError(
            "this model's images see themselves in both directions, which a cache of fixed length "
            "does not allow: leave cache_implementation out"
        )
    return {} if blocks is None else {"blocks": blocks}


def image_blocks(is_image: Tensor, bounds: Sequence[int] | None = None) -> Blocks | None:
    """Return the blocks of rows; None where there is no image.

    Args:
        is_image: bool [B, T]; neighbours are one image.
        bounds: of the documents of a pack.
    """
    starts = is_image & ~functional.pad(is_image, (1, 0))[:, :-1]
    numbers = starts.cumsum(dim=1) * is_image
    if bounds is None:
        return Blocks(numbers) if bool(is_image.any()) else None
    before = functional.pad(is_image[0].cumsum(dim=0), (1, 0)).tolist()
    documents = tuple(before[high] > before[low] for low, high in pairwise(bounds))
    return Blocks(numbers, documents) if any(documents) else None
