"""Tiny random encoders of native resolution, saved as one finds them on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLVisionConfig,
    Qwen2VLVisionConfig,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from tests.models.encoder_folders import save

QWEN: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {**QWEN, "embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32},
    "qwen2_5_vl": {
        **QWEN,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        **QWEN,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 1],
    },
}
"""Values of tiny vision configurations: windows of 2 x 2 blocks, positions of 5 x 5 patches."""


def qwen_processor(**changes: Any) -> dict[str, Any]:
    """The preprocessor file of Qwen2-VL: it gives no filter. 16 to 160 patches."""
    values = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 16 * 4**2,
        "max_pixels": 160 * 4**2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    return {**values, **changes}


def save_qwen2_vl(folder: Path) -> Path:
    torch.manual_seed(21)
    config = Qwen2VLVisionConfig(**VISION["qwen2_vl"])
    return save(folder, Qwen2VisionTransformerPretrainedModel(config), qwen_processor())


def save_qwen2_5_vl(folder: Path) -> Path:
    torch.manual_seed(22)
    config = Qwen2_5_VLVisionConfig(**VISION["qwen2_5_vl"])
    return save(folder, Qwen2_5_VisionTransformerPretrainedModel(config), qwen_processor())


def save_qwen3_vl(folder: Path) -> Path:
    """Its file names bounds as `size`, and the fast class."""
    torch.manual_seed(23)
    values = qwen_processor(image_processor_type="Qwen2VLImageProcessorFast")
    size = {"shortest_edge": values.pop("min_pixels"), "longest_edge": values.pop("max_pixels")}
    config = Qwen3VLVisionConfig(**VISION["qwen3_vl"])
    return save(folder, Qwen3VLVisionModel(config), {**values, "size": size})


def save_siglip2_naflex(folder: Path) -> Path:
    """Positions of 4 x 4 patches, images of up to 24."""
    torch.manual_seed(24)
    config = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_patches=16,
        patch_size=4,
    )
    values = {
        "image_processor_type": "Siglip2ImageProcessor",
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_num_patches": 24,
        "patch_size": 4,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
    }
    return save(folder, Siglip2VisionModel(config), values)


NATIVE: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen2_vl": save_qwen2_vl,
    "qwen3_vl": save_qwen3_vl,
    "siglip2_naflex": save_siglip2_naflex,
}
