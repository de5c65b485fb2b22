"""The projector of Gemma 3 (Gemma Team 2025, arXiv 2503.19786, section 2.1; in transformers'
implementation): average pooling, a root-mean-square norm, one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm.models.connectors.base import Connector
from mllm.models.connectors.cells import pool
from mllm.models.connectors.options import check_whole, square_side, whole


class Gemma3Norm(nn.Module):
    """x / rms(x) * (1 + weight), computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, cells: Tensor) -> Tensor:
        """Normalise [.., W]."""
        exact = cells.float()
        scale = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + self.eps)
        return (exact * scale * (1.0 + self.weight.float())).type_as(cells)


class Gemma3Projector(Connector):
    """`visual_tokens` tokens per view, whatever its grid.

    Options:
        visual_tokens: a square number (default 256).
        eps: of the norm (default 1e-6).
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("visual_tokens", "eps")
    RELOADABLE = ("visual_tokens",)

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        self.norm = Gemma3Norm(features, float(spec.get("eps") or 1e-6))
        self.second = nn.Linear(features, width, bias=False)

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse a number of tokens that is not a square, and a bad eps."""
        super().check(spec)
        check_whole(spec, ("visual_tokens",), "gemma3")
        tokens, eps = whole(spec, "visual_tokens", 256), spec.get("eps", 1e-6)
        if isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"connector gemma3: visual_tokens must be a square number (64, 144, 256, …), got "
                f"{tokens}"
            )
        if eps is not None and (isinstance(eps, bool) or not isinstance(eps, float) or eps <= 0):
            raise ValueError(f"connector gemma3: eps must be a small number above 0, got {eps!r}")

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the pooled grid.

        Raises:
            ValueError: more tokens than cells along a side.
        """
        side = square_side(whole(spec, "visual_tokens", 256), grid, "gemma3")
        return (side, side)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Pool [C, Dv] view by view, then map to [sum M, D]."""
        side = {self.output_grid(self.spec, grid)[0] for grid in grids}
        tokens: Tensor = self.second(self.norm(pool(features, grids, side.pop())))
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the matrix."""
        return self.second
