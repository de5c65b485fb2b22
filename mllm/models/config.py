"""The configuration of the assembled model: what config.json of a stage holds."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig


class MultimodalConfig(PreTrainedConfig):
    """Configuration of `MultimodalModel`.

    Attributes:
        encoder: what the encoder is rebuilt from: `name` (key of ENCODERS), `geometry`
            (ImageGeometry) and what the class adds.
        connector: what the connector is rebuilt from: `name` (key of CONNECTORS) and its options.
        fusion: how visual tokens reach the language model: `name` (key of FUSIONS) and its options;
            empty for in the sequence.
        images: the `images:` section: how images are cut into tiles, `tiling` (key of TILINGS) and
            its options; how regions are written, and what a clip may take.
        text_config: configuration of the language model (any causal LM of transformers).
        image_token: the placeholder in text.
        image_token_id: its id in the tokenizer; -1 in a configuration that is not filled in yet.
        origin: the composite that it was read from (`name` in mllm.models.composites), "" if it
            was assembled from parts.
        bidirectional_images: whether the tokens of an image see each other in both directions.
    """

    model_type = "mllm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}  # type: ignore[misc]

    encoder: dict[str, Any] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    fusion: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    text_config: Any = None
    image_token: str = "<image>"
    image_token_id: int = -1
    origin: str = ""
    bidirectional_images: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Make `text_config` an object; transformers does so only from 5.20."""
        if not isinstance(self.text_config, PreTrainedConfig):
            values = {"model_type": "llama", **(self.text_config or {})}
            self.text_config = AutoConfig.for_model(**values)
        super().__post_init__(**kwargs)
