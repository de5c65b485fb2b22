"""DINOv3 (Siméoni et al. 2025, arXiv 2508.10104), vision transformers and ConvNeXts, classes of
transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor
from transformers import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedConfig,
)

from mllm.models.encoders.vit import VisionTransformer, drop_mask_token
from mllm.parts import ENCODERS


class Dinov3VitEncoder(VisionTransformer):
    """Patch features of the last layer but one; class and register tokens are cut off after it.

    Positions are rotary and fit any side, so the preprocessor's counts. The random rescaling of
    positions that DINOv3 was pre-trained with is switched off.
    """

    OPTIONS = ENCODERS["dinov3_vit"].options
    MODEL = DINOv3ViTModel
    CONFIG = DINOv3ViTConfig
    FINAL_NORM = "norm"

    @classmethod
    def _takes(cls, config: PreTrainedConfig) -> int | None:
        return None

    def _strip(self) -> None:
        super()._strip()
        drop_mask_token(self.vision)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the rotary frequencies in fp32 when the weights change their dtype."""
        rotary: Any = self.vision.rope_embeddings
        kept = rotary.inv_freq
        super()._apply(fn, recurse)
        if rotary.inv_freq.dtype != kept.dtype:
            rotary.inv_freq = kept.to(rotary.inv_freq.device)
        return self


class Dinov3ConvNextEncoder(VisionTransformer):
    """The feature map of one stage; with `layer: -1`, the default, normalised as DINOv3 does.

    `layer` counts stages: -1 has one cell per 32 pixels, -2 one per 16, and so on. There is no
    class token: what transformers gives in its place is the mean of the cells.
    """

    OPTIONS = ENCODERS["dinov3_convnext"].options
    MODEL = DINOv3ConvNextModel
    CONFIG = DINOv3ConvNextConfig
    FINAL_NORM = "layer_norm"
    ATTENTION = "eager"  # it has none

    @classmethod
    def _depth(cls, config: PreTrainedConfig) -> int:
        return len(config.hidden_sizes)

    @classmethod
    def _cut(cls, config: PreTrainedConfig, depth: int) -> None:
        config.hidden_sizes = config.hidden_sizes[:depth]
        config.depths = config.depths[:depth]

    @classmethod
    def _width(cls, config: PreTrainedConfig) -> int:
        return int(config.hidden_sizes[-1])

    @classmethod
    def _cells(cls, config: PreTrainedConfig, side: int) -> int:
        return side >> (cls._depth(config) + 1)  # the first stage halves twice

    @classmethod
    def _takes(cls, config: PreTrainedConfig) -> int | None:
        return None
