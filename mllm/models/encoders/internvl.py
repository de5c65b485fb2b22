"""InternViT (Chen et al. 2023, arXiv 2312.14238, section 3.2), transformers' native classes.

A folder of the tower alone will do, or one of a whole InternVL, whose tower is then taken.
"""

from __future__ import annotations

from typing import ClassVar

from transformers import InternVLVisionConfig, InternVLVisionModel

from mllm.models.encoders.vit import VisionTransformer, drop_mask_token
from mllm.parts import ENCODERS


class InternVlEncoder(VisionTransformer):
    """Patch features of the last layer; the class token is left out.

    The tower of InternVL has no normalisation after its last layer.
    """

    OPTIONS = ENCODERS["internvl"].options
    MODEL = InternVLVisionModel
    CONFIG = InternVLVisionConfig
    FINAL_NORM = "layernorm"
    RENAMED: ClassVar[dict[str, str]] = {r"^(model\.)?vision_tower\.": ""}

    def _strip(self) -> None:
        super()._strip()
        drop_mask_token(self.vision)
