"""The SigLIP of Idefics3 (Laurençon et al. 2024, arXiv 2408.12637, section 3.2) and of SmolVLM
(Marafioti et al. 2025, arXiv 2504.05299), which share their classes in transformers.

Beside SigLIP's own class the last layer is normalised, and a cell finds its position by where it
lies between 0 and 1. Rounding gives neighbours one position where a side has 19, 25, 40 and some
other numbers of cells, so SigLIP's weights do not mean the same there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Idefics3VisionConfig, PreTrainedConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from mllm.models.encoders.preprocessor import read_preprocessor, square
from mllm.models.encoders.vit import VisionTransformer
from mllm.parts import ENCODERS


class Idefics3Encoder(VisionTransformer):
    """Patch features of the last layer, normalised; there is no class token.

    A folder of the tower alone will do, or one of a whole Idefics3 or SmolVLM.
    """

    OPTIONS = ENCODERS["idefics3"].options
    MODEL = Idefics3VisionTransformer
    CONFIG = Idefics3VisionConfig
    FINAL_NORM = "post_layernorm"
    RENAMED: ClassVar[dict[str, str]] = {r"^(model\.)?vision_model\.": ""}

    @classmethod
    def _own(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """Read SmolVLM's configuration as Idefics3's: the two have the same fields."""
        if type(config) is not SmolVLMVisionConfig:
            return config
        return Idefics3VisionConfig(**{**config.to_dict(), "model_type": cls.CONFIG.model_type})

    @classmethod
    def _preprocessor(cls, path: str | Path) -> Mapping[str, Any]:
        """Describe one tile: `size` is what the long edge is scaled to before it is cut."""
        seen = read_preprocessor(path)
        if "max_image_size" not in seen:
            return seen
        tile = seen["max_image_size"]
        edge = tile.get("longest_edge") if isinstance(tile, Mapping) else tile
        side = square(edge, f"{path}: max_image_size of the preprocessor file")
        return {**seen, "size": {"height": side, "width": side}, "do_pad": False}

    def features(self, images: Tensor) -> Tensor:
        """Encode [V, 3, S, S] to [V, cells, Dv].

        A view has no padding. The tower's own `forward` makes a mask nevertheless and reads its
        values: a GPU is waited for, and tensors without data fail.
        """
        vision: Any = self.vision
        cells = self.square.cells
        along = positions(cells, images.device)
        places = (along[:, None] * cells + along).flatten()
        states = vision.embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
        states = states + vision.embeddings.position_embedding(places)
        states = vision.encoder(inputs_embeds=states).last_hidden_state
        found: Tensor = vision.post_layernorm(states)
        return found


def positions(cells: int, device: torch.device | str | None = None) -> Tensor:
    """Return the position int64 [cells] of each cell along a side, as the tower rounds in fp32."""
    bounds = torch.arange(1 / cells, 1.0, 1 / cells, dtype=torch.float32, device=device)
    places = torch.arange(cells, dtype=torch.float32, device=device)
    places = places * (1.0 / torch.full((1,), cells, device=device))
    return torch.bucketize(places.clamp(max=1.0 - 1e-6), bounds, right=True)


def shares_positions(cells: int) -> bool:
    """Return whether rounding gives two of so many cells of a side one position."""
    return positions(cells, "cpu").tolist() != [*range(cells)]
