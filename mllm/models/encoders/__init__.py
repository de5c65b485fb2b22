"""Vision encoders by name."""

from mllm.models.encoders.aimv2 import Aimv2Encoder
from mllm.models.encoders.base import VisionEncoder
from mllm.models.encoders.blip2 import Blip2Encoder
from mllm.models.encoders.clip import ClipEncoder
from mllm.models.encoders.dinov2 import Dinov2Encoder, Dinov2WithRegistersEncoder
from mllm.models.encoders.dinov3 import Dinov3ConvNextEncoder, Dinov3VitEncoder
from mllm.models.encoders.efficientnet_lite import EfficientNetLiteEncoder
from mllm.models.encoders.idefics3 import Idefics3Encoder
from mllm.models.encoders.internvl import InternVlEncoder
from mllm.models.encoders.pair import PairEncoder
from mllm.models.encoders.qwen_vl import Qwen2_5VLEncoder, Qwen2VLEncoder, Qwen3VLEncoder
from mllm.models.encoders.siglip import SiglipEncoder
from mllm.models.encoders.siglip2_naflex import Siglip2NaflexEncoder
from mllm.models.encoders.timm_backbone import TimmEncoder

ENCODERS: dict[str, type[VisionEncoder]] = {
    "aimv2": Aimv2Encoder,
    "blip2": Blip2Encoder,
    "clip": ClipEncoder,
    "dinov2": Dinov2Encoder,
    "dinov2_with_registers": Dinov2WithRegistersEncoder,
    "dinov3_convnext": Dinov3ConvNextEncoder,
    "dinov3_vit": Dinov3VitEncoder,
    "efficientnet_lite": EfficientNetLiteEncoder,
    "idefics3": Idefics3Encoder,
    "internvl": InternVlEncoder,
    "pair": PairEncoder,
    "qwen2_5_vl": Qwen2_5VLEncoder,
    "qwen2_vl": Qwen2VLEncoder,
    "qwen3_vl": Qwen3VLEncoder,
    "siglip": SiglipEncoder,
    "siglip2_naflex": Siglip2NaflexEncoder,
    "timm": TimmEncoder,
}

WITHOUT_PATH = ("pair",)
"""Families whose parts have folders, not they."""

__all__ = ["ENCODERS", "WITHOUT_PATH", "VisionEncoder"]
