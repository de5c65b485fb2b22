"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), with and without register tokens (Darcet et al.
2023, arXiv 2309.16588), classes of transformers."""

from __future__ import annotations

from typing import ClassVar

from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from mllm.models.encoders.vit import VisionTransformer, drop_mask_token
from mllm.parts import ENCODERS


class Dinov2Encoder(VisionTransformer):
    """Patch features of the last layer but one, as Prismatic takes them (arXiv 2402.07865).

    The image side is the preprocessor's (224 in the published files), not the one of pre-training
    (518): positions are interpolated to it, bicubically, as transformers does.
    """

    OPTIONS = ENCODERS["dinov2"].options
    MODEL: ClassVar[type[PreTrainedModel]] = Dinov2Model
    CONFIG: ClassVar[type[PreTrainedConfig]] = Dinov2Config
    FINAL_NORM = "layernorm"

    @classmethod
    def _takes(cls, config: PreTrainedConfig) -> int | None:
        return None

    def _strip(self) -> None:
        super()._strip()
        drop_mask_token(self.vision)


class Dinov2WithRegistersEncoder(Dinov2Encoder):
    """As DINOv2 without them; the register tokens take part in attention and are cut off after it.

    They exist to hold what is not about a cell, so there is no option to keep them.
    """

    OPTIONS = ENCODERS["dinov2_with_registers"].options
    MODEL = Dinov2WithRegistersModel
    CONFIG = Dinov2WithRegistersConfig
