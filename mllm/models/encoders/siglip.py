"""SigLIP's vision transformer (Zhai et al. 2023, arXiv 2303.15343), classes of transformers.

SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786) keeps the architecture, and its checkpoints of
one resolution say `model_type: siglip`: this family loads both. The checkpoints of variable
resolution (`naflex`, `model_type: siglip2`) are another architecture: `siglip2_naflex`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, SiglipVisionConfig, SiglipVisionModel

from mllm.models.encoders.vit import VisionTransformer
from mllm.parts import ENCODERS


class SiglipEncoder(VisionTransformer):
    """Patch features of the last layer but one; with `layer: -1` normalised as SigLIP does.

    There is no class token; the pooling head is not built.
    """

    OPTIONS = ENCODERS["siglip"].options
    MODEL = SiglipVisionModel
    CONFIG = SiglipVisionConfig
    FINAL_NORM = "post_layernorm"
    UNUSED: ClassVar[Mapping[str, Any]] = {"vision_use_head": False}

    @classmethod
    def _read_config(cls, path: str | Path) -> PreTrainedConfig:
        try:
            return super()._read_config(path)
        except ValueError as error:
            if "'siglip2_vision_model'" not in str(error):
                raise
            raise ValueError(
                f"{path} holds a 'siglip2_vision_model' model, which is SigLIP 2 of variable "
                "resolution: name the encoder siglip2_naflex"
            ) from error
