"""The projector of Gemma 3 (Gemma Team 2025, arXiv 2503.19786, section 2.1; in transformers'
implementation): average pooling, a root-mean-square norm, one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.models.connectors.base import Connector
from mllm.models.connectors.cells import pool
from mllm.models.connectors.options import square_side
from mllm.parts import CONNECTORS
from mllm.parts.option import chosen


class Gemma3Norm(nn.Module):
    """x / rms(x) * (1 + weight), computed in fp32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, cells: Tensor) -> Tensor:
        """Normalise [.., W]."""
        exact = cells.to(torch.promote_types(cells.dtype, torch.float32))
        scale = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + self.eps)
        return (exact * scale * (1.0 + self.weight.to(exact.dtype))).type_as(cells)


class Gemma3Projector(Connector):
    """`visual_tokens` tokens per view, whatever its grid."""

    OPTIONS = CONNECTORS["gemma3"].options

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        self.norm = Gemma3Norm(features, float(chosen(self.OPTIONS, spec, "eps")))
        self.second = nn.Linear(features, width, bias=False)

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the pooled grid.

        Raises:
            ValueError: more tokens than cells along a side.
        """
        side = square_side(cls.number(spec, "visual_tokens"), grid, "gemma3")
        return (side, side)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Pool [C, Dv] view by view, then map to [sum M, D]."""
        side = {self.output_grid(self.spec, grid)[0] for grid in grids}
        tokens: Tensor = self.second(self.norm(pool(features, grids, side.pop())))
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the matrix."""
        return self.second
