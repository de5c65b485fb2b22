"""The packed attention function and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    MambaConfig,
)

from mllm.models import attention
from tests.models.conftest import llama_config

BOUNDS = (0, 5, 6, 17, 40)


def reference(q: Any, k: Any, v: Any, window: int | None, scale: float | None) -> torch.Tensor:
    """One masked SDPA over the whole pack."""
    documents = torch.repeat_interleave(torch.arange(len(BOUNDS) - 1), torch.tensor(BOUNDS).diff())
    at = torch.arange(BOUNDS[-1])
    seen = (documents[:, None] == documents) & (at[:, None] >= at)
    if window:
        seen &= at[:, None] - at < window
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen.to(q.device), scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def tensors(dtype: torch.dtype = torch.float32, device: str = "cpu", width: int = 8) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 40, width), (1, 2, 40, width), (1, 2, 40, width)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [one.to(device, dtype).requires_grad_() for one in made]


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sdpa_isolates_documents(window: int | None, scale: float | None) -> None:
    q, k, v = tensors()
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    out, _ = attention.packed_attention(
        nn.Module(), q, k, v, None, scaling=scale, cu_seqlens=bounds, sliding_window=window
    )
    wanted = reference(q, k, v, window, scale)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    for gradient, other in zip(
        found, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5)


def test_back_ends_are_named() -> None:
    assert attention.available_backends()[-1] == "sdpa"
    assert attention.chosen_backend("cpu") == "sdpa"
    assert attention.chosen_backend("cuda", torch.float32) == "sdpa"
    assert attention._varlen_attn() is not None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "varlen_attn", "sdpa"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_back_ends_agree_on_a_gpu(backend: Any, window: int | None, scale: float | None) -> None:
    if backend not in attention.available_backends():
        pytest.skip(f"{backend} is not installed here")
    q, k, v = tensors(torch.bfloat16, "cuda", 64)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    out = attention._BACKENDS[backend](q, k, v, bounds, BOUNDS, scale, window, 0.0)
    exact = tensors(torch.bfloat16, "cuda", 64)
    wanted = reference(*(one.float() for one in exact), window, scale)
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)
    found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    for gradient, other in zip(
        found, torch.autograd.grad(wanted.square().sum(), exact), strict=True
    ):
        torch.testing.assert_close(gradient.float(), other.float(), rtol=5e-2, atol=5e-2)


def fake_varlen(names: str) -> Callable[..., Any]:
    """torch's varlen_attn of some version, computed document by document on the CPU."""

    def attend(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *_: Any, **got: Any) -> Any:
        assert set(got) <= set(names.split())
        if "enable_gqa" not in got:
            assert key.shape[1] == query.shape[1]
        outputs = []
        for start, stop in itertools.pairwise(cu_q.tolist()):
            q, k, v = (t[start:stop].transpose(0, 1)[None] for t in (query, key, value))
            at = torch.arange(stop - start)
            seen = at[:, None] >= at
            left = got.get("window_size", (-1, 0))[0]
            if left >= 0:
                seen &= at[:, None] - at <= left
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=got.get("scale"), enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    import inspect

    plain = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    kinds = inspect.Parameter
    attend.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in plain]
        + [kinds(name, kinds.KEYWORD_ONLY, default=None) for name in names.split()]
    )
    return attend


@pytest.mark.parametrize(
    "names", ["is_causal return_aux", "is_causal scale", "window_size scale enable_gqa"]
)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_signature_of_varlen_attn(
    monkeypatch: pytest.MonkeyPatch, names: str, window: int | None, scale: float | None
) -> None:
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", fake_varlen(names))
    attention._varlen_attn.cache_clear()
    q, k, v = tensors()
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    try:
        if window and "window_size" not in names:
            with pytest.raises(ValueError, match="no sliding window"):
                attention._varlen(q, k, v, bounds, BOUNDS, scale, window, 0.0)
            return
        out = attention._varlen(q, k, v, bounds, BOUNDS, scale, window, 0.0)
        torch.testing.assert_close(out, reference(q, k, v, window, scale), rtol=0, atol=1e-6)
    finally:
        attention._varlen_attn.cache_clear()


def test_what_a_layer_asks_in_vain_is_refused() -> None:
    q, k, v = tensors()
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    for extra in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match="not supported"):
            attention.packed_attention(
                nn.Module(), q, k, v, None, cu_seqlens=bounds, **{extra: 30.0}
            )
    with pytest.raises(ValueError, match="without a cache"):
        attention.packed_attention(nn.Module(), q[:, :, :3], k, v, None, cu_seqlens=bounds)
    two = [torch.cat([one, one]) for one in (q, k, v)]
    with pytest.raises(ValueError, match="one row"):
        attention.packed_attention(nn.Module(), *two, None, cu_seqlens=bounds)


def test_a_model_that_drops_the_bounds_is_noticed(build: Callable[..., Any]) -> None:
    model, processor = build()
    from data_packing.pack import collate
    from tests.models.conftest import documents

    pack = collate([processor.encode(one) for one in documents()], 0)
    inner = model.language_model.model.layers[1].self_attn
    forward = inner.forward

    def forgetful(*args: Any, cu_seqlens: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    inner.forward = forgetful
    with pytest.raises(ValueError, match="does not receive cu_seqlens"):
        model.hidden_states(pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens)

    inner.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match="in 1 of its 2 layers"):
        model.hidden_states(pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens)


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SMALL, head_dim=8, intermediate_size=16), "softcapping"),
        (GraniteConfig(**SMALL, logits_scaling=8.0), "scaled logits"),
        (Llama4TextConfig(**SMALL, intermediate_size_mlp=16, head_dim=8), "chunked_attention"),
    ],
    ids=["gemma2", "granite", "llama4"],
)
def test_configurations_that_would_be_wrong_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        attention.check_supported(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2), "AttentionInterface"),
        (MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2), "linear_attention"),
        (
            GptOssConfig(
                **SMALL,
                num_key_value_heads=1,
                head_dim=8,
                intermediate_size=16,
                num_local_experts=2,
                num_experts_per_tok=1,
            ),
            "sinks",
        ),
    ],
    ids=["bloom", "mamba", "gpt_oss"],
)
def test_models_that_would_be_wrong_are_refused(config: Any, reason: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=reason):
        attention.check_supported(config, model)


def test_a_llama_is_accepted(tmp_path: Path) -> None:
    config = llama_config()
    attention.check_supported(config, AutoModelForCausalLM.from_config(config))
