"""The patch merger of Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1) and its heirs.

A norm, space to depth, an MLP. Qwen2-VL has a LayerNorm, Qwen2.5-VL an RMSNorm, Qwen3-VL a
LayerNorm again; where Qwen3-VL merges the features of inner layers, the norm comes after space to
depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mllm.models.connectors.base import Connector
from mllm.models.connectors.cells import space_to_depth
from mllm.models.connectors.options import check_whole, whole

_EPSILON = 1e-6  # of all three


class PatchMerger(Connector):
    """One visual token per block of factor x factor cells.

    Options:
        factor: side of a block (default 2); grids that it does not divide as in PixelShuffle.
        norm: `layer` (default) or `rms`.
        norm_after: whether the norm is over a whole block (default false: over a cell).
        hidden: width between the two layers (default: a block's, factor x factor x Dv).
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("factor", "norm", "norm_after", "hidden")

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        self.factor = whole(spec, "factor", 2)
        self.norm_after = bool(spec.get("norm_after"))
        wide = features * self.factor**2
        kind = nn.RMSNorm if spec.get("norm") == "rms" else nn.LayerNorm
        self.norm = kind(wide if self.norm_after else features, eps=_EPSILON)
        hidden = whole(spec, "hidden", wide)
        self.first = nn.Linear(wide, hidden)
        self.act = nn.GELU()
        self.second = nn.Linear(hidden, width)

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse numbers that are none, and a norm that is unknown."""
        super().check(spec)
        check_whole(spec, ("factor", "hidden"), "patch_merger")
        if spec.get("norm") not in (None, "layer", "rms"):
            raise ValueError(
                f"connector patch_merger: norm must be layer or rms, got {spec['norm']!r}"
            )
        if not isinstance(spec.get("norm_after", False), bool):
            raise ValueError(
                "connector patch_merger: norm_after must be true or false, "
                f"got {spec['norm_after']!r}"
            )

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of blocks; the last ones may be padded."""
        factor = whole(spec, "factor", 2)
        return -(-grid[0] // factor), -(-grid[1] // factor)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map [C, Dv] to [sum M, D]."""
        if self.norm_after:
            wide = self.norm(space_to_depth(features, grids, self.factor))
        else:
            wide = space_to_depth(self.norm(features), grids, self.factor)
        tokens: Tensor = self.second(self.act(self.first(wide)))
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the second layer."""
        return self.second

    def input_norm(self) -> nn.LayerNorm | None:
        """Return the norm if it is a LayerNorm, whose bias can be set."""
        return self.norm if isinstance(self.norm, nn.LayerNorm) else None
