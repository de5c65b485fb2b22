"""A two-layer GELU MLP per cell (LLaVA-1.5, arXiv 2310.03744, section 3.2), after a LayerNorm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mllm.models.connectors.base import Connector
from mllm.parts import CONNECTORS
from mllm.parts.option import chosen


class Mlp(Connector):
    """One visual token per grid cell."""

    OPTIONS = CONNECTORS["mlp"].options

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        hidden = self.number(spec, "hidden", width)
        bias = chosen(self.OPTIONS, spec, "bias")
        if chosen(self.OPTIONS, spec, "norm"):
            self.norm = nn.LayerNorm(features)
        self.first = nn.Linear(features, hidden, bias=bias)
        self.act = nn.GELU()
        self.second = nn.Linear(hidden, width, bias=bias)

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid itself."""
        return grid

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map [C, Dv] to [C, D]."""
        norm = self.input_norm()
        cells = features if norm is None else norm(features)
        tokens: Tensor = self.second(self.act(self.first(cells)))
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the second layer."""
        return self.second

    def input_norm(self) -> nn.LayerNorm | None:
        """Return the LayerNorm, if there is one."""
        return getattr(self, "norm", None)
