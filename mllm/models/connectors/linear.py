"""One linear layer per cell (LLaVA, arXiv 2304.08485, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mllm.models.connectors.base import Connector


class Linear(Connector):
    """One visual token per grid cell."""

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        self.only = nn.Linear(features, width)

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid itself."""
        return grid

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map [C, Dv] to [C, D]."""
        tokens: Tensor = self.only(features)
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the layer."""
        return self.only
