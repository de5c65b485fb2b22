"""CLIP's vision transformer (Radford et al. 2021, arXiv 2103.00020), classes of transformers."""

from __future__ import annotations

from transformers import CLIPVisionConfig, CLIPVisionModel

from mllm.models.encoders.vit import VisionTransformer, drop
from mllm.parts import ENCODERS


class ClipEncoder(VisionTransformer):
    """Patch features of the last layer but one, as LLaVA takes them; the class token is left out.

    No normalisation follows the chosen layer: CLIP's own only serves its class token.
    """

    OPTIONS = ENCODERS["clip"].options
    MODEL = CLIPVisionModel
    CONFIG = CLIPVisionConfig
    FINAL_NORM = "post_layernorm"

    def _strip(self) -> None:
        drop(self.vision, self.FINAL_NORM)
