"""Which visual tokens stand where in the text, and the newline among them.

M visual tokens that all views make, K image tokens in the text, J places of visual tokens that are
named for them, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Newline(nn.Module):
    """A learned row [D] beside the visual tokens (LLaVA-NeXT's `image_newline`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Put the newline [D] after visual tokens [M, D]: [M + 1, D]."""
        return torch.cat([tokens, self.weight[None]])


def standing(rows: Tensor, order: Tensor, bags: Tensor | None) -> Tensor:
    """Return what stands at the image tokens, [K, D], of rows [M, D] or [M + 1, D].

    Args:
        order: [J], places among the rows; -1 is the last row.
        bags: [K], how many of these each image token is the mean of. None or empty: one.
    """
    chosen = rows.index_select(0, order % len(rows))
    if bags is None or not len(bags):
        return chosen
    owners = torch.arange(len(bags), device=bags.device)
    owners = owners.repeat_interleave(bags, output_size=len(chosen))
    total = rows.new_zeros(len(bags), rows.shape[1]).index_add(0, owners, chosen)
    return total / bags[:, None]
