"""Language models that a pack would get wrong are refused by name, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BertConfig,
    BloomConfig,
    DeepseekV4Config,
    DogeConfig,
    FalconConfig,
    FalconH1Config,
    FalconMambaConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPTJConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MptConfig,
    NemotronConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
    Zamba2Config,
    xLSTMConfig,
)

from mllm.models import attention
from mllm.models.families import LogitsRule, blueprint, check_config, check_model, logits_rule
from mllm.models.language import load_language_model
from mllm.models.probe import probe
from tests.models.families import GATED, GEMMA, save_family

STATE = "carries a state over every document"
INTERFACE = "AttentionInterface"

BY_CONFIGURATION: list[tuple[type[PreTrainedConfig], dict[str, Any], str]] = [
    (BambaConfig, {}, STATE),
    (FalconH1Config, {}, STATE),
    (FalconMambaConfig, {}, STATE),
    (GraniteMoeHybridConfig, {}, STATE),
    (JambaConfig, {}, STATE),
    (Mamba2Config, {}, STATE),
    (MambaConfig, {}, STATE),
    (MiniMaxConfig, {}, STATE),
    (Qwen3NextConfig, {}, STATE),
    (Qwen3_5TextConfig, {}, STATE),
    (RecurrentGemmaConfig, {}, STATE),
    (Zamba2Config, {}, STATE),
    (Lfm2Config, {"full_attn_idxs": [0]}, "convolutions"),
    (DeepseekV4Config, {}, "not attention inside a document"),
    (Llama4TextConfig, {}, "chunked_attention"),
    (BloomConfig, {}, INTERFACE),
    (FalconConfig, {}, INTERFACE),
    (GPTJConfig, {}, INTERFACE),
    (MptConfig, {}, INTERFACE),
    (RwkvConfig, {}, INTERFACE),
    (xLSTMConfig, {}, INTERFACE),
    (T5Config, {}, "no causal language model"),
    (Gemma3TextConfig, {"use_bidirectional_attention": True}, "later tokens"),
    (Gemma3nTextConfig, {}, "token ids in every layer"),
    (OPTConfig, {"layerdrop": 0.1}, "skips layers"),
    (LlamaConfig, {"is_causal": False}, "not causal"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    BY_CONFIGURATION,
    ids=[k.model_type for k, _, _ in BY_CONFIGURATION],
)
def test_configurations(kind: type[PreTrainedConfig], changes: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.model_type}.*{reason}"):
        check_config(kind(**changes))


BY_RUNNING: list[tuple[PreTrainedConfig, str]] = [
    (BertConfig(**GATED), "^bert .*mask of its own"),
    (DogeConfig(**GATED), "a mask of its own"),
    (NemotronConfig(**GATED), "does not receive cu_seqlens"),
]


@pytest.mark.parametrize(
    ("config", "reason"), BY_RUNNING, ids=[config.model_type for config, _ in BY_RUNNING]
)
def test_whole_models(config: PreTrainedConfig, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        load_language_model(save_family(tmp_path, config))


def test_weights_are_not_touched_for_what_a_configuration_says(tmp_path: Path) -> None:
    MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mamba.*carries a state"):
        load_language_model(tmp_path)


def test_a_scale_that_nobody_explained_is_refused() -> None:
    for setting in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        config = LlamaConfig(**GATED)
        assert logits_rule(config) == LogitsRule()
        setattr(config, setting, 8.0)
        with pytest.raises(ValueError, match=f"llama has .* \\({setting}\\)"):
            logits_rule(config)


def llama() -> Any:
    config = LlamaConfig(**GATED)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    return model.eval()


def test_the_probe_finds_a_leak() -> None:
    """A convolution, a state or anything else beside attention, whatever it is called."""
    model = llama()
    probe(model)

    class Neighbours(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden + 0.1 * hidden.roll(1, dims=1))

    model.model.layers[1].mlp = Neighbours(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match="LlamaForCausalLM: a document's logits change"):
        probe(model)


def test_the_probe_finds_logits_that_are_not_the_models_own() -> None:
    model = llama()
    plain = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="not those that LlamaForCausalLM computes"):
        probe(model)


def test_the_probe_finds_a_window_that_only_the_mask_has() -> None:
    config = MistralConfig(**GATED, sliding_window=7)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    probe(model.eval())
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
        forward = layer.self_attn.forward

        def forgetful(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        layer.self_attn.forward = forgetful
        layer.self_attn.config = LlamaConfig(**GATED, attn_implementation=attention.NAME)
        layer.self_attn.config.sliding_window = None
    with pytest.raises(ValueError, match="window of 7 tokens, but no layer"):
        probe(model)


def test_convolutions_are_found_among_the_modules() -> None:
    model = blueprint(GemmaConfig(**GEMMA))
    check_model(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.get_submodule("model.layers.0").mixer = nn.Conv1d(32, 32, 3, device="meta")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mixer is a convolution"):
        check_model(model)
