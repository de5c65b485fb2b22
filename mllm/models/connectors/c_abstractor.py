"""Convolutions around a pooling (C-Abstractor of Honeybee, arXiv 2312.06742, section 3.2).

Learned positions, ResNet blocks, adaptive average pooling, ResNet blocks, MLP. The blocks are those
that Honeybee takes from RegNet-Y (arXiv 2003.13678): 1x1, depthwise 3x3, squeeze-and-excitation,
1x1, with LayerNorm over the channels of a cell instead of batch norm, which would tie the images
of a batch together. Only the 3x3 convolution sees neighbours: views are spread over maps with zeros
around them for it alone, which is what its own border is made of, so a view never meets another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm.models.connectors.base import Connector
from mllm.models.connectors.cells import Padding, pool
from mllm.models.connectors.options import square_side
from mllm.parts import CONNECTORS

_EPS = 1e-6


class Block(nn.Module):
    """A RegNet-Y block with SiLU; its 1x1 convolutions are linear layers over the cells [C, W]."""

    def __init__(self, entering: int, width: int) -> None:
        super().__init__()
        squeezed = max(1, round(entering / 4))
        self.first = nn.Linear(entering, width, bias=False)
        self.first_norm = nn.LayerNorm(width, eps=_EPS)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.depthwise_norm = nn.LayerNorm(width, eps=_EPS)
        self.squeeze = nn.Linear(width, squeezed)
        self.excite = nn.Linear(squeezed, width)
        self.last = nn.Linear(width, width, bias=False)
        self.last_norm = nn.LayerNorm(width, eps=_EPS)
        self.shortcut: nn.Module = nn.Identity()
        if entering != width:
            layers = nn.Linear(entering, width, bias=False), nn.LayerNorm(width, eps=_EPS)
            self.shortcut = nn.Sequential(*layers)

    def forward(self, cells: Tensor, padding: Padding) -> Tensor:
        """Map [C, entering] to [C, width]."""
        inner = functional.silu(self.first_norm(self.first(cells)))
        maps = self.depthwise(padding.spread(inner).permute(0, 3, 1, 2))
        inner = functional.silu(self.depthwise_norm(padding.gather(maps.permute(0, 2, 3, 1))))
        gate = self.excite(functional.silu(self.squeeze(padding.mean(inner)))).sigmoid()
        inner = self.last_norm(self.last(inner * padding.repeat(gate)))
        return functional.silu(inner + self.shortcut(cells))


class CAbstractor(Connector):
    """`visual_tokens` tokens per view, whatever its grid, with the neighbourhood kept.

    Weights start as Honeybee's do: positions at a truncated normal of 0.02, the rest as torch draws
    it.
    """

    OPTIONS = CONNECTORS["c_abstractor"].options

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        hidden, depth = self.number(spec, "hidden"), self.number(spec, "depth")
        side = self.number(spec, "positions")
        self.side = isqrt(self.number(spec, "visual_tokens"))
        self.positions = nn.Parameter(torch.empty(features, side, side))
        nn.init.trunc_normal_(self.positions, std=0.02)
        widths = [features] + [hidden] * (depth - 1)
        self.before = nn.ModuleList(Block(entering, hidden) for entering in widths)
        self.after = nn.ModuleList(Block(hidden, hidden) for _ in range(depth))
        self.first = nn.Linear(hidden, width)
        self.act = nn.SiLU()
        self.second = nn.Linear(width, width)

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the pooled grid.

        Raises:
            ValueError: more tokens than cells along a side.
        """
        side = square_side(cls.number(spec, "visual_tokens"), grid, "c_abstractor")
        return (side, side)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map [C, Dv] to [sum M, D]."""
        for grid in grids:
            self.output_grid(self.spec, grid)
        cells = features + self._positions(grids)
        padding = Padding(grids, features.device)
        for block in self.before:
            cells = block(cells, padding)
        cells = pool(cells, grids, self.side)
        padding = Padding([(self.side, self.side)] * len(grids), features.device)
        for block in self.after:
            cells = block(cells, padding)
        tokens: Tensor = self.second(self.act(self.first(cells)))
        return tokens

    def _positions(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Return the positions [C, Dv] of all cells; bilinear where the grid is not the table's."""
        table = self.positions[None]
        read = {
            grid: functional.interpolate(table, grid, mode="bilinear")[0].flatten(1).T
            for grid in dict.fromkeys(grids)
        }
        return torch.cat([read[grid] for grid in grids])

    def last_linear(self) -> nn.Linear:
        """Return the last layer of the MLP."""
        return self.second
