"""SigLIP 2 of variable resolution, NaFlex (Tschannen et al. 2025, arXiv 2502.14786, section 2.4.2).

Classes of transformers. Checkpoints of one resolution are the family `siglip`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from mllm.models.connectors.cells import sequences
from mllm.models.encoders.native_vit import NativeTransformer
from mllm.models.geometry import Size
from mllm.parts import ENCODERS


class Siglip2NaflexEncoder(NativeTransformer):
    """Patch features of the last layer but one; with `layer: -1` normalised as SigLIP 2 does.

    Views are padded to the longest and the padding is masked: NaFlex scales every image to nearly
    as many patches as are allowed, so little is padded. The pooling head is not built.
    """

    OPTIONS = ENCODERS["siglip2_naflex"].options
    MODEL = Siglip2VisionModel
    CONFIG = Siglip2VisionConfig
    FINAL_NORM = "post_layernorm"
    PREPROCESSOR = "Siglip2ImageProcessor"
    UNUSED: ClassVar[Mapping[str, Any]] = {"vision_use_head": False}

    def encode(self, maps: Sequence[Tensor], grids: Sequence[Size]) -> Tensor:
        """Encode patches, each as (row, column, channel) of its pixels."""
        vision: Any = self.vision
        patches = torch.cat([one.transpose(1, 2).flatten(0, 1).flatten(1) for one in maps])
        padding = sequences(grids, patches.device)
        states = vision.embeddings.patch_embedding(patches) + self._positions(grids, patches)
        mask = padding.mask()
        states = vision.encoder(
            inputs_embeds=padding.spread(states).flatten(0, 1),
            attention_mask=None if mask is None else mask[:, None, None, :],
        ).last_hidden_state
        cells: Tensor = vision.post_layernorm(padding.gather(states[:, None]))
        return cells

    def _positions(self, grids: Sequence[Size], like: Tensor) -> Tensor:
        """The learned square of positions at each view's grid, [C, Dv].

        The table is called as a module, so that a shard of it is gathered.
        """
        embeddings: Any = self.vision.embeddings
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding(torch.arange(side * side, device=like.device))
        counts = [rows * columns for rows, columns in grids]
        shapes = torch.tensor(list(grids), device="cpu")
        resized = embeddings.resize_positional_embeddings(
            table.view(side, side, -1), shapes, max_length=max(counts)
        )
        return torch.cat([one[:count] for one, count in zip(resized, counts, strict=True)])
