"""What language models need beside attention, and which of them are refused by name.

Any causal LM of transformers that goes through its AttentionInterface can be assembled. What is
looked at here, before any weight is loaded, is its configuration and its modules on the meta
device; `probe` then runs the loaded model once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mllm.models.positions import check_directions
from mllm.models.qwen_vl_text import CAUSAL

_ATTENTION = {"attention", "full_attention", "sliding_attention"}
_MIXERS = {
    "linear_attention": "carries a state over every document before a token",
    "hybrid": "carries a state over every document before a token",
    "hybrid_sliding": "mixes neighbouring tokens by convolutions",
    "conv": "mixes neighbouring tokens by convolutions",
    "recurrent": "carries a state over every document before a token",
    "chunked_attention": "cuts attention into chunks that do not begin with documents",
    "indexed_attention": "chooses what a token sees among the tokens of all documents",
}
"""Layer type of a configuration → why a pack would leak through it."""

_REFUSED: dict[str, str] = {
    "use_bidirectional_attention": "attends to later tokens",
    "hidden_size_per_layer_input": "reads token ids in every layer, and an image has none",
    "layerdrop": "skips layers at random",
}
"""Setting → what it does; refused unless empty."""


@dataclass(frozen=True, slots=True)
class LogitsRule:
    """What a family does to the numbers that its output layer gives.

    Attributes:
        times: they are multiplied by this,
        cap: then x becomes cap * tanh(x / cap). None: not.
    """

    times: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits [.., V] of the output layer's numbers [.., V]."""
        if self.times != 1.0:
            logits = logits * self.times
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def _capped(config: Any) -> LogitsRule:
    return LogitsRule(cap=config.final_logit_softcapping)


def _divided(config: Any) -> LogitsRule:
    return LogitsRule(times=1.0 / config.logits_scaling)


def _multiplied(config: Any) -> LogitsRule:
    return LogitsRule(times=config.logits_scaling)


def _scaled(config: Any) -> LogitsRule:
    return LogitsRule(times=config.logit_scale)


_LOGITS: dict[str, Callable[[Any], LogitsRule]] = {
    "beam": _capped,
    "cohere": _scaled,
    "cohere2": _scaled,
    "cohere2_moe": _scaled,
    "gemma2": _capped,
    "gemma3_text": _capped,
    "granite": _divided,
    "granite_swa": _divided,
    "granitemoe": _divided,
    "granitemoe_swa": _divided,
    "granitemoeshared": _divided,
    "hyperclovax": _multiplied,
    "minicpm3": _divided,
    "nanochat": _capped,
    "vaultgemma": _capped,
}
"""`model_type` → its rule. The same setting divides in one family and multiplies in another."""

_LOGITS_SETTINGS = {
    "final_logit_softcapping": "a soft cap on the logits",
    "lm_head_multiplier": "scaled logits",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
}


def logits_rule(config: PreTrainedConfig) -> LogitsRule:
    """Return what the language model does after its output layer.

    Raises:
        ValueError: it has a setting for that, and what the family makes of it is not known here.
    """
    if config.model_type in _LOGITS:
        return _LOGITS[config.model_type](config)
    for setting, what in _LOGITS_SETTINGS.items():
        if getattr(config, setting, None) not in (None, 1, 1.0):
            raise ValueError(f"{config.model_type} has {what} ({setting}), which is not supported")
    return LogitsRule()


class OutputLayer(nn.Module):
    """A language model's output layer with what its family does afterwards.

    The layer inside stays the language model's own and is called as a module, so that hooks on it
    (a sharded weight is gathered by one) run; only this view of it is made anew.
    """

    def __init__(self, head: nn.Module, rule: LogitsRule) -> None:
        super().__init__()
        self.head = head
        self.rule = rule

    @property
    def weight(self) -> Tensor:
        """[V, D], the output layer's own."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states [.., D] into logits [.., V]."""
        return self.rule(self.head(hidden))


def output_layer(head: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Return what turns hidden states into logits: the head itself in most families."""
    rule = logits_rule(config)
    return head if rule == LogitsRule() else OutputLayer(head, rule)


def causal_class(config: PreTrainedConfig) -> Any:
    """Return what has `from_config` and `from_pretrained` for this causal language model.

    Ours are not registered with transformers' Auto class: before 5.19 it ignores, in silence, a
    class for one of its own configurations.
    """
    return CAUSAL.get(type(config), AutoModelForCausalLM)


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class of this causal language model, None where there is none."""
    kind: Any = type(config)
    return CAUSAL.get(kind) or AutoModelForCausalLM._model_mapping.get(kind, None)


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a language model that would be wrong, from its configuration alone.

    Raises:
        ValueError: naming the model and the reason.
    """
    name = config.model_type
    types: Any = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    for kind in sorted(set(types or ()) - _ATTENTION):
        why = _MIXERS.get(kind, "is not attention inside a document")
        raise ValueError(
            f"{name}: layers of type {kind} are not supported: such a layer {why}, so documents "
            "of a pack would leak into each other"
        )
    for setting, what in _REFUSED.items():
        if getattr(config, setting, None):
            raise ValueError(f"{name} {what} ({setting}), which is not supported")
    logits_rule(config)
    check_directions(config)
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{name} is not causal; a causal language model is needed")
    model = model_class(config)
    if model is None:
        raise ValueError(
            f"{name}: transformers has no causal language model of this kind; give a language "
            "model here (encoders go to model.encoder)"
        )
    if not model._supports_attention_backend:
        raise ValueError(
            f"{name}: {model.__name__} does not use transformers' AttentionInterface, so its "
            "documents cannot be kept apart in a pack"
        )


def check_model(model: nn.Module) -> None:
    """Refuse a language model for the modules that it is made of (meta device or not).

    Raises:
        ValueError: naming the model and the reason.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            raise ValueError(
                f"{type(model).__name__}: {path} is a convolution, which mixes neighbouring "
                "tokens, so documents of a pack would leak into each other"
            )
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(f"{type(model).__name__} has no output layer")


def blueprint(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the language model without weights, to be looked at."""
    with torch.device("meta"):
        model: PreTrainedModel = causal_class(config).from_config(
            copy.deepcopy(config), dtype=dtype
        )
    return model
