"""The language models inside Qwen2-VL, Qwen2.5-VL and Qwen3-VL as causal language models.

transformers has their bodies alone; with an output layer they are language models like any other.
`mllm.models.families` finds them by the configurations of the bodies.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeTextModel,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLPreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoePreTrainedModel


class _CausalText(PreTrainedModel, GenerationMixin):
    """A body and an output layer, tied to the embedding where the configuration says so."""

    BODY: ClassVar[type[PreTrainedModel]]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.BODY(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """Build the model without weights, as `AutoModelForCausalLM.from_config` does."""
        model: PreTrainedModel = cls._from_config(config, **kwargs)
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, W]; arguments as every causal language model of transformers."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep or None, None) if last else logits_to_keep  # type: ignore[operator]
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class Qwen2VLTextForCausalLM(_CausalText, Qwen2VLPreTrainedModel):
    """Qwen2-VL's language model."""

    config_class = Qwen2VLTextConfig
    BODY = Qwen2VLTextModel


class Qwen2_5VLTextForCausalLM(_CausalText, Qwen2_5_VLPreTrainedModel):
    """Qwen2.5-VL's language model."""

    config_class = Qwen2_5_VLTextConfig
    BODY = Qwen2_5_VLTextModel


class Qwen3VLTextForCausalLM(_CausalText, Qwen3VLPreTrainedModel):
    """Qwen3-VL's language model; it reads features of inner layers where it is handed them."""

    config_class = Qwen3VLTextConfig
    BODY = Qwen3VLTextModel


class Qwen3VLMoeTextForCausalLM(_CausalText, Qwen3VLMoePreTrainedModel):
    """Qwen3-VL's language model with a mixture of experts."""

    config_class = Qwen3VLMoeTextConfig
    BODY = Qwen3VLMoeTextModel


CAUSAL: dict[type[PreTrainedConfig], type[_CausalText]] = {
    Qwen2VLTextConfig: Qwen2VLTextForCausalLM,
    Qwen2_5_VLTextConfig: Qwen2_5VLTextForCausalLM,
    Qwen3VLMoeTextConfig: Qwen3VLMoeTextForCausalLM,
    Qwen3VLTextConfig: Qwen3VLTextForCausalLM,
}
"""Configuration → the causal language model that transformers does not have."""
