"""SigLIP's vision transformer (Zhai et al. 2023, arXiv 2303.15343), classes of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, SiglipVisionConfig, SiglipVisionModel

from mllm.models.encoders.vit import VisionTransformer, drop


class SiglipEncoder(VisionTransformer):
    """Patch features of the last layer but one; with `layer: -1` normalised as SigLIP does."""

    MODEL = SiglipVisionModel
    CONFIG = SiglipVisionConfig

    @classmethod
    def _config(cls, spec: Mapping[str, Any]) -> PreTrainedConfig:
        config = super()._config(spec)
        config.vision_use_head = False
        return config

    def _strip(self) -> None:
        if self.spec["layer"] != -1:
            drop(self.vision, "post_layernorm")
