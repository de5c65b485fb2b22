"""Tiny random encoders of every family, saved as one finds them on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Idefics3VisionConfig,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedModel,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SHARED: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
}


def save(folder: Path, model: PreTrainedModel, preprocessor: dict[str, Any]) -> Path:
    """Write the model and its preprocessor file. Every weight is random, the zeros too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def save_dinov2(folder: Path) -> Path:
    """Positions of 5 x 5 patches, images of 4 x 4: as in the published files, 518 and 224."""
    torch.manual_seed(11)
    config = Dinov2Config(**{**SHARED, "image_size": 40}, drop_path_rate=0.5)
    return save(folder, Dinov2Model(config), bit())


def save_dinov2_with_registers(folder: Path) -> Path:
    torch.manual_seed(12)
    config = Dinov2WithRegistersConfig(**{**SHARED, "image_size": 40}, num_register_tokens=2)
    return save(folder, Dinov2WithRegistersModel(config), bit())


def bit() -> dict[str, Any]:
    """The preprocessor of DINOv2: the short edge to 36, 32 cut out of it."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 36},
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        **IMAGENET,
    }


def dinov3() -> dict[str, Any]:
    """The preprocessor of DINOv3: squash, bilinear."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "crop_size": None,
        "do_center_crop": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        **IMAGENET,
    }


def save_dinov3_vit(folder: Path) -> Path:
    torch.manual_seed(13)
    config = DINOv3ViTConfig(
        **SHARED, intermediate_size=32, num_register_tokens=2, pos_embed_rescale=2.0
    )
    return save(folder, DINOv3ViTModel(config), dinov3())


def save_dinov3_convnext(folder: Path) -> Path:
    torch.manual_seed(14)
    config = DINOv3ConvNextConfig(
        hidden_sizes=[6, 8, 16], depths=[1, 2, 1], image_size=32, drop_path_rate=0.5
    )
    values = {**dinov3(), "size": {"height": 64, "width": 64}}
    return save(folder, DINOv3ConvNextModel(config), values)


def save_aimv2(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(15)
    config = Aimv2VisionConfig(**{**SHARED, "intermediate_size": 32, **changes})
    values = {
        **bit(),
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    return save(folder, Aimv2VisionModel(config), values)


def save_internvl_tower(folder: Path) -> Path:
    """With a last norm, and the mask token that only pre-training used."""
    torch.manual_seed(16)
    config = InternVLVisionConfig(
        **SHARED,
        intermediate_size=32,
        attention_bias=True,
        use_mean_pooling=False,
        use_mask_token=True,
        projection_dropout=0.5,
    )
    return save(folder, InternVLVisionModel(config), squash())


def save_idefics3_tower(folder: Path) -> Path:
    torch.manual_seed(17)
    config = Idefics3VisionConfig(**SHARED, intermediate_size=32)
    return save(folder, Idefics3VisionTransformer(config), squash())


def squash() -> dict[str, Any]:
    """A preprocessor that squashes, bicubic."""
    return {
        **dinov3(),
        "image_processor_type": "SiglipImageProcessor",
        "resample": 3,
        "do_convert_rgb": True,
    }


SAVERS: dict[str, Callable[[Path], Path]] = {
    "aimv2": save_aimv2,
    "dinov2": save_dinov2,
    "dinov2_with_registers": save_dinov2_with_registers,
    "dinov3_convnext": save_dinov3_convnext,
    "dinov3_vit": save_dinov3_vit,
    "idefics3": save_idefics3_tower,
    "internvl": save_internvl_tower,
}
