"""Average pooling to a smaller grid, then the MLP (DeCo, arXiv 2405.20985)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm.models.connectors.mlp import Mlp
from mllm.models.connectors.options import square_side
from mllm.parts import CONNECTORS


class AveragePool(Mlp):
    """`visual_tokens` tokens per view, whatever its grid.

    Pooling has no weights, so the same weights serve another number of tokens.
    """

    OPTIONS = CONNECTORS["average_pool"].options

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the pooled grid.

        Raises:
            ValueError: more tokens than cells.
        """
        side = square_side(spec["visual_tokens"], grid, "average_pool")
        return (side, side)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Pool [C, Dv] view by view to the smaller grid, then map to [sum M, D]."""
        return super().forward(self._pooled(features, grids), grids)

    def _pooled(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Average cells [C, Dv] to [sum M, Dv]; views of one grid are pooled together."""
        if len(set(grids)) == 1:
            return self._pool(features, grids[0]).flatten(0, 1)
        views = features.split([rows * columns for rows, columns in grids])
        pooled: dict[int, Tensor] = {}
        for grid in dict.fromkeys(grids):
            places = [place for place, other in enumerate(grids) if other == grid]
            same = self._pool(torch.cat([views[place] for place in places]), grid)
            pooled.update(zip(places, same, strict=True))
        return torch.cat([pooled[place] for place in range(len(grids))])

    def _pool(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Average the cells [V * N, Dv] of views of one grid to [V, M, Dv]."""
        maps = features.unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)
        small = functional.adaptive_avg_pool2d(maps, self.output_grid(self.spec, grid))
        return small.flatten(2).transpose(1, 2)
