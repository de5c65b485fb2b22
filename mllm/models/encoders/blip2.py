"""The vision transformer of a BLIP-2 folder (Li et al. 2023, arXiv 2301.12597, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel, PreTrainedConfig

from mllm.models.encoders.vit import VisionTransformer
from mllm.parts import ENCODERS
from mllm.parts.option import chosen


class Blip2Encoder(VisionTransformer):
    """EVA-CLIP's ViT-g without its last layer, normalised.

    BLIP-2's Q-Former reads the class token beside the patches, so here it is one more cell, before
    the others: the features are a row without places. `class_cell: false` leaves it out and gives
    the grid, which connectors that look at neighbours need.
    """

    MODEL = Blip2VisionModel
    CONFIG = Blip2VisionConfig
    FINAL_NORM = "post_layernorm"
    OPTIONS = ENCODERS["blip2"].options
    RENAMED: ClassVar[dict[str, str]] = {r"^vision_model\.": ""}

    @classmethod
    def spec_from(
        cls, config: PreTrainedConfig, seen: Mapping[str, Any], path: str | Path, **options: Any
    ) -> dict[str, Any]:
        """As every vision transformer's, and whether the class token is a cell."""
        class_cell = chosen(cls.OPTIONS, options, "class_cell")
        spec = super().spec_from(config, seen, path, **options)
        if class_cell:
            spec["geometry"]["class_cell"] = True
        return spec

    def features(self, images: Tensor) -> Tensor:
        """Encode [V, 3, S, S] to [V, cells, Dv], with the class token first where it is one."""
        if not self.square.class_cell:
            return super().features(images)
        states: Tensor = self.vision(images).last_hidden_state
        return states
