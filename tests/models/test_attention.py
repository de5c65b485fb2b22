"""The packed attention function and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mllm.models import attention, backends

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


def outright(
    q: Any, k: Any, v: Any, window: int | None, softcap: float | None, sinks: Any
) -> torch.Tensor:
    """Soft caps and sinks over the whole pack, head by head."""
    documents = torch.repeat_interleave(torch.arange(len(BOUNDS) - 1), torch.tensor(BOUNDS).diff())
    at = torch.arange(BOUNDS[-1])
    seen = (documents[:, None] == documents) & (at[:, None] >= at)
    if window:
        seen &= at[:, None] - at < window
    heads = []
    for head in range(q.shape[1]):
        keys, values = k[0, head // 2], v[0, head // 2]
        scores = q[0, head] @ keys.T * q.shape[-1] ** -0.5
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        weights = scores.exp() * seen
        total = weights.sum(-1, keepdim=True) + (sinks[head].exp() if sinks is not None else 0)
        heads.append(weights / total @ values)
    return torch.stack(heads, dim=1)[None]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinking", [False, True])
def test_soft_caps_and_sinks(window: int | None, softcap: float | None, sinking: bool) -> None:
    q, k, v = tensors()
    sinks = torch.tensor([0.0, 1.0, -1.0, 2.0], requires_grad=True) if sinking else None
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    options: Any = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    out, _ = attention.packed_attention(nn.Module(), q, k, v, None, cu_seqlens=bounds, **options)
    wanted = outright(q, k, v, window, softcap, sinks)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    inputs = [q, k, v, *([sinks] if sinking else [])]
    found = torch.autograd.grad(out.square().sum(), inputs)
    for gradient, other in zip(
        found, torch.autograd.grad(wanted.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5)


def test_values_may_be_narrower_than_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in multi-head latent attention; fused kernels get zeros beside them."""
    q, k, v = tensors()
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    narrow = v[..., :5]
    wanted = reference(q, k, narrow, None, None)
    for backend in ("sdpa", "varlen_attn"):
        monkeypatch.setattr(backends, "chosen_backend", lambda *_, name=backend: name)
        monkeypatch.setitem(backends.BACKENDS, "varlen_attn", same_width)
        out = backends.attend_in_documents(q, k, narrow, bounds, BOUNDS, None, None, 0.0)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


def same_width(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    """A kernel that wants one width."""
    assert query.shape[-1] == value.shape[-1]
    return backends._sdpa(query, key, value, *rest)


def test_back_ends_are_named() -> None:
    assert backends.available_backends()[-1] == "sdpa"
    assert backends.chosen_backend("cpu") == "sdpa"
    assert backends.chosen_backend("cuda", torch.float32) == "sdpa"
    assert backends._varlen_attn() is not None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "varlen_attn", "sdpa"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_back_ends_agree_on_a_gpu(backend: Any, window: int | None, scale: float | None) -> None:
    if backend not in backends.available_backends():
        pytest.skip(f"{backend} is not installed here")
    q, k, v = tensors(torch.bfloat16, "cuda", 64)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    out = backends.BACKENDS[backend](q, k, v, bounds, BOUNDS, scale, window, 0.0)
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
    backends._varlen_attn.cache_clear()
    q, k, v = tensors()
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    try:
        if window and "window_size" not in names:
            with pytest.raises(ValueError, match="no sliding window"):
                backends._varlen(q, k, v, bounds, BOUNDS, scale, window, 0.0)
            return
        out = backends._varlen(q, k, v, bounds, BOUNDS, scale, window, 0.0)
        torch.testing.assert_close(out, reference(q, k, v, window, scale), rtol=0, atol=1e-6)
    finally:
        backends._varlen_attn.cache_clear()


def test_what_a_layer_asks_in_vain_is_refused() -> None:
    q, k, v = tensors()
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    for extra, reason in (
        (("position_bias", True), "not supported"),
        (("is_causal", False), "causal"),
    ):
        with pytest.raises(ValueError, match=reason):
            attention.packed_attention(
                nn.Module(), q, k, v, None, cu_seqlens=bounds, **dict([extra])
            )
    with pytest.raises(ValueError, match="a mask of its own"):
        attention.packed_attention(nn.Module(), q, k, v, q, cu_seqlens=bounds)
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
