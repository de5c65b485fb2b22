"""Makes transformers' Auto classes know the model."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mllm.models.config import MultimodalConfig
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor

AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig, exist_ok=True)
AutoModelForImageTextToText.register(MultimodalConfig, MultimodalModel, exist_ok=True)
AutoProcessor.register(MultimodalConfig, Processor, exist_ok=True)
