"""AIMv2's vision transformer (Fini et al. 2024, arXiv 2411.14402), classes of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import Aimv2VisionConfig, Aimv2VisionModel, PreTrainedConfig

from mllm.models.encoders.vit import VisionTransformer
from mllm.parts import ENCODERS


class Aimv2Encoder(VisionTransformer):
    """Patch features of the last layer, normalised: the ones that its pre-training decodes.

    There is no class token; the pooling head of the `lit` checkpoints is not built. Checkpoints of
    native resolution compute their positions, so the preprocessor's side counts.
    """

    OPTIONS = ENCODERS["aimv2"].options
    MODEL = Aimv2VisionModel
    CONFIG = Aimv2VisionConfig
    FINAL_NORM = "rms_norm"
    RENAMED: ClassVar[dict[str, str]] = {r"^vision_model\.": ""}  # `lit` folders hold both towers
    UNUSED: ClassVar[Mapping[str, Any]] = {"use_head": False}

    @classmethod
    def _takes(cls, config: PreTrainedConfig) -> int | None:
        return None if config.is_native else int(config.image_size)
