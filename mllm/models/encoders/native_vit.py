"""What encoders of native resolution share: views of any size in one call.

Shapes: V views, B bytes of all their pixels, C patches of all views, p side of a patch, m patches
of a block in each direction, Dv features of a patch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mllm.models.encoders.preprocessor import read_native
from mllm.models.encoders.vit import VisionTransformer
from mllm.models.geometry import Size
from mllm.models.native import NativeGeometry


class NativeTransformer(VisionTransformer):
    """Patch features of one layer; attention stays inside each view.

    Spec: as `VisionTransformer`, with a `NativeGeometry`.
    """

    GEOMETRY = NativeGeometry
    PREPROCESSOR: ClassVar[str]
    geometry: NativeGeometry

    @classmethod
    def _merge(cls, config: PreTrainedConfig) -> int:
        """Patches of a block in each direction."""
        return 1

    @classmethod
    def _read_geometry(
        cls,
        config: PreTrainedConfig,
        seen: Mapping[str, Any],
        path: str | Path,
        options: Mapping[str, Any],
    ) -> NativeGeometry:
        patch, merge = int(config.patch_size), cls._merge(config)
        return read_native(seen, path, cls.PREPROCESSOR, patch, merge, options)

    @abstractmethod
    def encode(self, maps: Sequence[Tensor], grids: Sequence[Size]) -> Tensor:
        """Encode views to features [C, Dv], row by row of each grid.

        Args:
            maps: of each view its normalised patches [rows, p, columns, p, 3].
            grids: (rows, columns) of each.
        """

    def forward(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Encode views to features [C, Dv]; arguments and errors as `VisionEncoder.forward`."""
        views: list[list[int]] = sizes.tolist()
        grids, patch = self.grids(views), self.geometry.patch
        lengths = [3 * height * width for height, width in views]
        if pixels.shape != (sum(lengths),):
            raise ValueError(
                f"{len(views)} views have {sum(lengths)} bytes of pixels, got {list(pixels.shape)}"
            )
        colours = self.normalised(pixels.view(-1, 3)).to(next(self.parameters()).dtype)
        maps = colours.split([length // 3 for length in lengths])
        return self.encode(
            [
                one.view(rows, patch, columns, patch, 3)
                for one, (rows, columns) in zip(maps, grids, strict=True)
            ],
            grids,
        )


def in_blocks(cells: Tensor, grid: Size, merge: int) -> Tensor:
    """Put the cells [rows x columns, ...] of a view into the order of blocks.

    Blocks come row by row, and so do the cells inside one.
    """
    rows, columns = grid
    blocks = cells.unflatten(0, (rows // merge, merge, columns // merge, merge))
    ordered: Tensor = blocks.transpose(1, 2).flatten(0, 3)
    return ordered


def in_rows(cells: Tensor, grids: Sequence[Size], merge: int) -> Tensor:
    """Put the cells [C, Dv] of views from the order of blocks back row by row."""
    counts = [rows * columns for rows, columns in grids]
    return torch.cat(
        [
            one.unflatten(0, (rows // merge, columns // merge, merge, merge))
            .transpose(1, 2)
            .flatten(0, 3)
            for one, (rows, columns) in zip(cells.split(counts), grids, strict=True)
        ]
    )
