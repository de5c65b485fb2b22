"""The patch merger of Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1) and its heirs.

A norm, space to depth, an MLP. Qwen2-VL has a LayerNorm, Qwen2.5-VL an RMSNorm, Qwen3-VL a
LayerNorm again; where Qwen3-VL merges the features of inner layers, the norm comes after space to
depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.models.connectors.base import Connector
from mllm.models.connectors.cells import blocks, check_block, space_to_depth
from mllm.parts import CONNECTORS

_EPSILON = 1e-6  # of all three


class _Merger(nn.Module):
    """Blocks of one level: [C, features] to [sum M, width]."""

    def __init__(
        self, features: int, width: int, factor: int, hidden: int, rms: bool, norm_after: bool
    ) -> None:
        super().__init__()
        self.factor, self.norm_after = factor, norm_after
        wide = features * factor**2
        kind = nn.RMSNorm if rms else nn.LayerNorm
        self.norm = kind(wide if norm_after else features, eps=_EPSILON)
        self.first = nn.Linear(wide, hidden)
        self.act = nn.GELU()
        self.second = nn.Linear(hidden, width)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Return [sum M, width]."""
        if self.norm_after:
            wide = self.norm(space_to_depth(features, grids, self.factor))
        else:
            wide = space_to_depth(self.norm(features), grids, self.factor)
        tokens: Tensor = self.second(self.act(self.first(wide)))
        return tokens


class PatchMerger(Connector):
    """One visual token per block of factor x factor cells; padded as by `pixel_shuffle`.

    With several `levels` as many layers of the encoder stand side by side in its features. Each has
    a merger of its own, and their tokens stand side by side again, for the fusion `deepstack`. The
    norms of all but the first come after space to depth.
    """

    OPTIONS = CONNECTORS["patch_merger"].options

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        self.factor, self.levels = self.number(spec, "factor"), self.number(spec, "levels")
        if features % self.levels or width % self.levels:
            raise ValueError(
                f"connector patch_merger: levels {self.levels} divides neither or only one of "
                f"{features}, the encoder's width, and {width}, what is made of it: fusion "
                "deepstack asks for one level more than it has layers, and the encoder makes them "
                "with deepstack: true"
            )
        self.norm_after = bool(spec.get("norm_after"))
        features, width = features // self.levels, width // self.levels
        hidden = self.number(spec, "hidden", features * self.factor**2)
        shape = (features, width, self.factor, hidden, spec.get("norm") == "rms")
        self.merger = _Merger(*shape, self.norm_after)
        self.inner = nn.ModuleList(_Merger(*shape, True) for _ in range(1, self.levels))

    @classmethod
    def check_side(cls, spec: Mapping[str, Any], cells: int) -> None:
        """Refuse a block that is larger than every view: it would be padding for the most part."""
        check_block("patch_merger", cls.number(spec, "factor"), cells)

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of blocks; the last ones may be padded."""
        return blocks(grid, cls.number(spec, "factor"))

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map [C, Dv] to [sum M, D]."""
        levels = features.chunk(self.levels, dim=-1)
        mergers = (self.merger, *self.inner)
        made = [merger(level, grids) for merger, level in zip(mergers, levels, strict=True)]
        return torch.cat(made, dim=-1)

    def last_linear(self) -> nn.Linear:
        """Return the second layer, of the first level."""
        return self.merger.second

    def input_norm(self) -> nn.LayerNorm | None:
        """Return the first level's norm if it is a LayerNorm, whose bias can be set."""
        norm = self.merger.norm
        return norm if isinstance(norm, nn.LayerNorm) else None
