"""Space to depth, then an MLP (InternVL 1.5, arXiv 2404.16821, section 3.1; SmolVLM, 2504.05299).

Legend: the channels of a wide cell are ordered (row in the block, column in the block, channel).
InternVL's and Idefics3's (hence SmolVLM's) pixel shuffles in transformers write the same
permutation in two ways; torch's `pixel_unshuffle` is another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mllm.models.connectors.base import Connector
from mllm.models.connectors.cells import blocks, check_block, space_to_depth
from mllm.parts import CONNECTORS


class PixelShuffle(Connector):
    """One visual token per block of factor x factor cells.

    A side of the grid that the factor does not divide is padded with zero cells on the right and
    below, so a grid of r x c gives ceil(r/f) x ceil(c/f) tokens. Two layers are InternVL's
    LayerNorm and two-layer GELU MLP; one is the single linear layer of Idefics3 and SmolVLM, which
    has no bias there and one that starts at zero here, unless `bias` is off.
    """

    OPTIONS = CONNECTORS["pixel_shuffle"].options

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        self.factor = self.number(spec, "factor")
        self.layers = self.number(spec, "layers")
        wide = features * self.factor**2
        if self.layers == 2:
            hidden = self.number(spec, "hidden", width)
            self.norm = nn.LayerNorm(wide)
            self.first = nn.Linear(wide, hidden)
            self.act = nn.GELU()
            self.second = nn.Linear(hidden, width)
        else:
            self.second = nn.Linear(wide, width, bias=spec.get("bias") is not False)
            if self.second.bias is not None:
                nn.init.zeros_(self.second.bias)

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse more than two layers, and a width between layers where there is one."""
        super().check(spec)
        layers = cls.number(spec, "layers")
        if layers > 2:
            raise ValueError(f"connector pixel_shuffle: layers must be 1 or 2, got {layers}")
        if layers == 1 and spec.get("hidden") is not None:
            raise ValueError(
                "connector pixel_shuffle: hidden is the width between two layers; with layers: 1 "
                "leave it out"
            )
        if layers == 2 and spec.get("bias") is False:
            raise ValueError("connector pixel_shuffle: bias: false needs layers: 1")

    @classmethod
    def check_side(cls, spec: Mapping[str, Any], cells: int) -> None:
        """Refuse a block that is larger than every view: it would be padding for the most part."""
        check_block("pixel_shuffle", cls.number(spec, "factor"), cells)

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of blocks; the last ones may be padded."""
        return blocks(grid, cls.number(spec, "factor"))

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map [C, Dv] to [sum M, D]."""
        wide = space_to_depth(features, grids, self.factor)
        if self.layers == 2:
            wide = self.act(self.first(self.norm(wide)))
        tokens: Tensor = self.second(wide)
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the last layer."""
        return self.second

    def input_norm(self) -> nn.LayerNorm | None:
        """Return the LayerNorm over a wide cell, if there are two layers."""
        return self.norm if self.layers == 2 else None
