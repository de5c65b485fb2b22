"""Tiny configurations of language-model families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLTextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLMoeTextConfig,
    Qwen3VLTextConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from mllm.models.families import causal_class
from tests.models.conftest import make_tokenizer

WINDOW = 7
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GATED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
GEMMA = {**GATED, "head_dim": 16}
EXPERTS = {**GATED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    **GATED,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
DIRECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(
        **GATED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**GEMMA),
    "qwen2_vl_text": Qwen2VLTextConfig(
        **GATED,
        rope_parameters=DIRECTIONS,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen2_5_vl_text": Qwen2_5_VLTextConfig(**GATED, rope_parameters=DIRECTIONS),
    "qwen3_vl_text": Qwen3VLTextConfig(
        **GEMMA, rope_parameters={**DIRECTIONS, "mrope_section": [4, 2, 2]}
    ),
    "qwen3_vl_moe_text": Qwen3VLMoeTextConfig(
        **EXPERTS, head_dim=16, rope_parameters={**DIRECTIONS, "mrope_section": [4, 2, 2]}
    ),
    "qwen2_moe": Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**EXPERTS, head_dim=16),
    "mistral": MistralConfig(**GATED, sliding_window=WINDOW),
    "gemma": GemmaConfig(**GEMMA),
    "gemma2": Gemma2Config(
        **GEMMA,
        **SLIDING,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": Gemma3TextConfig(**GEMMA, **SLIDING, query_pre_attn_scalar=8),
    "phi": PhiConfig(**GATED),
    "phi3": Phi3Config(**GATED, sliding_window=WINDOW),
    "smollm3": SmolLM3Config(**GATED, no_rope_layers=[1, 0]),
    "opt": OPTConfig(**SMALL, ffn_dim=64, init_std=0.2, dropout=0.0, word_embed_proj_dim=16),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=64, initializer_range=0.2, **NO_DROPOUT),
    "gpt2": GPT2Config(
        **SMALL, initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "mixtral": MixtralConfig(**GATED, num_local_experts=4, sliding_window=WINDOW),
    "deepseek_v3": DeepseekV3Config(
        **LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),
    "minicpm3": MiniCPM3Config(**LATENT, dim_model_base=8),
    "gpt_oss": GptOssConfig(**GEMMA, **SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "granite": GraniteConfig(
        **GATED, logits_scaling=8.0, embedding_multiplier=12.0, attention_multiplier=0.3
    ),
    "granitemoe": GraniteMoeConfig(**GATED, logits_scaling=6.0, num_local_experts=4),
    "cohere": CohereConfig(**GATED, logit_scale=0.25),
    "olmo2": Olmo2Config(**GATED),
    "olmo3": Olmo3Config(**GATED, **SLIDING),
    "starcoder2": Starcoder2Config(
        **GATED, sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0
    ),
}


def save_family(folder: Path, config: PreTrainedConfig, seed: int = 0) -> Path:
    """A language model of random weights, with its tokenizer, as one finds it on disk."""
    torch.manual_seed(seed)
    model = causal_class(config).from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
