"""The learned row that ends a line of visual tokens, and the order in which they stand.

M visual tokens of all views, K image tokens in the text, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Newline(nn.Module):
    """A row [D] beside the visual tokens (LLaVA-NeXT's `image_newline`), and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Return rows [K, D] of tokens [M, D] in this order [K]; -1 is the newline."""
        return in_order(torch.cat([tokens, self.weight[None]]), order)


def in_order(rows: Tensor, order: Tensor) -> Tensor:
    """Return rows [K, D] of rows [M, D]; -1 is the last."""
    return rows.index_select(0, order % len(rows))
