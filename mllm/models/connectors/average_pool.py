"""Average pooling to a smaller grid, then the MLP (DeCo, arXiv 2405.20985)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from torch import Tensor

from mllm.models.connectors.mlp import Mlp
from mllm.models.connectors.views import pool


class AveragePool(Mlp):
    """`visual_tokens` tokens per image, whatever the encoder's grid.

    Pooling has no weights, so the same weights serve another number of tokens. Options:
    `visual_tokens` (a square number) and those of Mlp.
    """

    OPTIONS = ("visual_tokens", *Mlp.OPTIONS)
    RELOADABLE = ("visual_tokens",)

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse a number of tokens that is not a square."""
        super().check(spec)
        tokens = spec.get("visual_tokens")
        if not isinstance(tokens, int) or tokens < 1 or isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"connector average_pool: visual_tokens must be a square number (16, 49, 144, …), "
                f"got {tokens!r}"
            )

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the pooled grid.

        Raises:
            ValueError: more tokens than cells along a side.
        """
        side = isqrt(spec["visual_tokens"])
        if side > min(grid):
            raise ValueError(
                f"connector average_pool: visual_tokens {spec['visual_tokens']} is a "
                f"{side} x {side} grid, but the encoder gives {grid[0]} x {grid[1]} cells"
            )
        return (side, side)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Pool the cells [C, Dv] of each view to the smaller grid, then map to [sum M, D]."""
        for grid in grids:
            self.output_grid(self.spec, grid)
        return super().forward(pool(features, grids, isqrt(self.spec["visual_tokens"])), grids)
