"""Learned queries read the cells by cross-attention (Perceiver resampler).

Flamingo, arXiv 2204.14198, section 2.1 and appendix A.1.1: the queries attend to the cells and to
themselves in one attention. The layers are those of Idefics2 (arXiv 2405.02246, section 3.2):
RMSNorm, no biases, a gated SiLU MLP.

Legend: V views, L cells of the longest view, Q queries, H hidden width, A heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm.models.connectors.base import Connector
from mllm.models.connectors.cells import sequences
from mllm.parts import CONNECTORS

_EPS = 1e-6
_STD = 0.02


class Layer(nn.Module):
    """Attention of the queries to the cells and to themselves, then a gated MLP."""

    def __init__(self, hidden: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.query_norm = nn.RMSNorm(hidden, eps=_EPS)
        self.cell_norm = nn.RMSNorm(hidden, eps=_EPS)
        self.query = nn.Linear(hidden, inner, bias=False)
        self.key = nn.Linear(hidden, inner, bias=False)
        self.value = nn.Linear(hidden, inner, bias=False)
        self.out = nn.Linear(inner, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=_EPS)
        self.gate = nn.Linear(hidden, 4 * hidden, bias=False)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, queries: Tensor, cells: Tensor, mask: Tensor | None) -> Tensor:
        """Map queries [V, Q, H], which read cells [V, L, H], to [V, Q, H].

        `mask`: bool [V, 1, 1, L + Q], true where there is something to attend to.
        """
        own = self.query_norm(queries)
        seen = torch.cat([self.cell_norm(cells), own], dim=1)
        attended = functional.scaled_dot_product_attention(
            self._split(self.query(own)),
            self._split(self.key(seen)),
            self._split(self.value(seen)),
            attn_mask=mask,
        )
        queries = queries + self.out(attended.transpose(1, 2).flatten(2))
        inner = self.mlp_norm(queries)
        result: Tensor = queries + self.down(functional.silu(self.gate(inner)) * self.up(inner))
        return result

    def _split(self, x: Tensor) -> Tensor:
        """[V, n, A x E] to [V, A, n, E]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Resampler(Connector):
    """`visual_tokens` tokens per view, whatever its grid; which cells they read is learned.

    A linear layer leads to the hidden width and another to the language model's. Linear weights
    start at a normal of 0.02, as Idefics2's; the queries at a truncated normal of 0.02 (Perceiver,
    arXiv 2103.03206): queries that start alike, like Idefics2's ones, would stay alike.
    """

    OPTIONS = CONNECTORS["resampler"].options

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        hidden = self.number(spec, "hidden", features)
        heads, head_width = self.number(spec, "heads"), self.number(spec, "head_width")
        self.first = nn.Linear(features, hidden)
        self.queries = nn.Parameter(torch.empty(self.number(spec, "visual_tokens"), hidden))
        self.layers = nn.ModuleList(
            Layer(hidden, heads, head_width) for _ in range(self.number(spec, "depth"))
        )
        self.norm = nn.RMSNorm(hidden, eps=_EPS)
        self.last = nn.Linear(hidden, width)
        nn.init.trunc_normal_(self.queries, std=_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return one row of all queries."""
        return (1, cls.number(spec, "visual_tokens"))

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map [C, Dv] to [V x Q, D]."""
        padding = sequences(grids, features.device)
        cells = padding.spread(self.first(features)).flatten(1, 2)
        mask = padding.mask()
        if mask is not None:
            mask = functional.pad(mask, (0, len(self.queries)), value=True)[:, None, None]
        queries = self.queries.expand(len(grids), -1, -1)
        for layer in self.layers:
            queries = layer(queries, cells, mask)
        tokens: Tensor = self.last(self.norm(queries).flatten(0, 1))
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the layer that leads to the language model's width."""
        return self.last
