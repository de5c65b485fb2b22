"""Makes transformers' Auto classes know the model."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mllm.models.config import MultimodalConfig
from mllm.models.image_processor import MultimodalImageProcessor
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor

AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig, exist_ok=True)
AutoModel.register(MultimodalConfig, MultimodalModel, exist_ok=True)
AutoModelForImageTextToText.register(MultimodalConfig, MultimodalModel, exist_ok=True)
AutoProcessor.register(MultimodalConfig, Processor, exist_ok=True)
AutoImageProcessor.register(
    MultimodalConfig,
    image_processor_classes={"pil": MultimodalImageProcessor},
    exist_ok=True,
)
