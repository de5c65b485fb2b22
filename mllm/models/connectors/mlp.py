"""LayerNorm and a two-layer GELU MLP per cell (LLaVA-1.5, arXiv 2310.03744)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mllm.models.connectors.base import Connector
from mllm.parts import CONNECTORS


class Mlp(Connector):
    """One visual token per grid cell."""

    OPTIONS = CONNECTORS["mlp"].options

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        hidden = self.number(spec, "hidden", width)
        self.norm = nn.LayerNorm(features)
        self.first = nn.Linear(features, hidden)
        self.act = nn.GELU()
        self.second = nn.Linear(hidden, width)

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid itself."""
        return grid

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map [C, Dv] to [C, D]."""
        tokens: Tensor = self.second(self.act(self.first(self.norm(features))))
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the second layer."""
        return self.second

    def input_norm(self) -> nn.LayerNorm:
        """Return the LayerNorm."""
        return self.norm
