"""A two-layer GELU MLP per cell (LLaVA-1.5, arXiv 2310.03744, section 3.2), after a LayerNorm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mllm.models.connectors.base import Connector
from mllm.models.connectors.options import check_flag


class Mlp(Connector):
    """One visual token per grid cell.

    Options:
        hidden: the width between the two layers (default: the language model's).
        norm: whether a LayerNorm comes first (default true; LLaVA has none).
        bias: whether the two layers have one (default true).
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("hidden", "norm", "bias")

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        hidden, bias = spec.get("hidden") or width, spec.get("bias") is not False
        if spec.get("norm") is not False:
            self.norm = nn.LayerNorm(features)
        self.first = nn.Linear(features, hidden, bias=bias)
        self.act = nn.GELU()
        self.second = nn.Linear(hidden, width, bias=bias)

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse switches that are neither on nor off."""
        super().check(spec)
        for name in ("norm", "bias"):
            check_flag(spec, name, "mlp")

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
