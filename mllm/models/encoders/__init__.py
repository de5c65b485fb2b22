"""Vision encoders by name."""

from mllm.models.encoders.base import VisionEncoder
from mllm.models.encoders.clip import ClipEncoder
from mllm.models.encoders.efficientnet_lite import EfficientNetLiteEncoder
from mllm.models.encoders.siglip import SiglipEncoder

ENCODERS: dict[str, type[VisionEncoder]] = {
    "clip": ClipEncoder,
    "efficientnet_lite": EfficientNetLiteEncoder,
    "siglip": SiglipEncoder,
}

__all__ = ["ENCODERS", "VisionEncoder"]
