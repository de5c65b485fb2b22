"""Promises 1 and 2: a pack computes what its documents compute alone, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from data_packing.document import Document
from data_packing.pack import Pack, collate
from data_packing.sample import IGNORED
from mllm.models.connectors import CONNECTORS
from mllm.models.fusion import FUSIONS
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.conftest import documents, make_tokenizer, open_gates

CASES = [
    ("clip", "mlp"),
    ("siglip", "average_pool"),
    ("efficientnet_lite", "average_pool"),
    ("aimv2", "mlp"),
    ("dinov2", "average_pool"),
    ("dinov2_with_registers", "mlp"),
    ("dinov3_convnext", "average_pool"),
    ("dinov3_vit", "average_pool"),
    ("siglip", "gemma3"),
    ("idefics3", "pixel_shuffle"),
    ("internvl", "pixel_shuffle"),
]


def logits_of(model: MultimodalModel, pack: Pack, packed: bool = True, **kwargs: Any) -> Tensor:
    hidden = model.hidden_states(
        pack.input_ids[None],
        pack.pixels,
        pack.sizes,
        pack.order,
        pack.bags,
        position_ids=pack.position_ids[None] if packed else None,
        cu_seqlens=pack.cu_seqlens if packed else None,
        **kwargs,
    )
    return model.lm_head(hidden)[0]


def loss_of(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits_TV[:-1], labels_T[1:], ignore_index=IGNORED, reduction="sum"
    )


def gradients(model: MultimodalModel) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


def assert_packed_is_unpacked(
    model: MultimodalModel, processor: Processor, chosen: list[Document] | None = None
) -> None:
    samples = [processor.encode(document) for document in chosen or documents()]
    pack = collate(samples, 0)
    logits = logits_of(model, pack)
    packed_loss = loss_of(logits, pack.labels)
    packed_loss.backward()
    packed = gradients(model)

    alone, loss = [], torch.zeros(())
    for sample in samples:
        one = collate([sample], 0)
        rows = logits_of(model, one, packed=False)
        loss = loss + loss_of(rows, one.labels)
        alone.append(rows)
    loss.backward()
    unpacked = gradients(model)

    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    assert packed.keys() == unpacked.keys()
    for name, expected in unpacked.items():
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(packed[name] / scale, expected / scale, rtol=0, atol=1e-5)
    assert any(name.startswith("encoder") and g.abs().max() > 0 for name, g in packed.items())
    assert any(name.startswith("connector") and g.abs().max() > 0 for name, g in packed.items())


@pytest.mark.parametrize(("encoder", "connector"), CASES)
def test_logits_loss_and_gradients(build: Callable[..., Any], encoder: str, connector: str) -> None:
    model, processor = build(encoder, connector)
    model.train()
    assert_packed_is_unpacked(model, processor)


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
}


def save_small(folder: Path, kind: type[PreTrainedConfig], **changes: Any) -> Path:
    torch.manual_seed(0)
    config = kind(**{**SMALL, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (MistralConfig, {"sliding_window": 7}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        (Qwen3Config, {"head_dim": 16}),
        (PhiConfig, {}),
        (OlmoConfig, {}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_families_and_sliding_windows(
    build: Callable[..., Any], tmp_path: Path, kind: type[PreTrainedConfig], changes: Any
) -> None:
    model, processor = build("clip", "mlp", save_small(tmp_path, kind, **changes))
    model.train()
    assert_packed_is_unpacked(model, processor)


FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt_neox": (GPTNeoXConfig, {"rotary_pct": 0.5}),
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        name: save_small(root / name, kind, **changes) for name, (kind, changes) in FAMILIES.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector_with_every_fusion_and_three_families(
    build: Callable[..., Any],
    language_models: dict[str, Path],
    connector: str,
    fusion: str,
    family: str,
) -> None:
    model, processor = build("clip", connector, language_models[family], fusion=fusion)
    open_gates(model).train()
    assert_packed_is_unpacked(model, processor)


def test_a_window_changes_the_result(build: Callable[..., Any], tmp_path: Path) -> None:
    """So that the test above cannot pass by ignoring windows on both sides."""
    results = []
    for window in (7, None):
        folder = save_small(tmp_path / str(window), MistralConfig, sliding_window=window)
        model, processor = build("clip", "mlp", folder)
        pack = collate([processor.encode(document) for document in documents()], 0)
        with torch.no_grad():
            results.append(logits_of(model, pack))
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_changing_one_document_leaves_the_others_bit_equal(build: Callable[..., Any]) -> None:
    model, processor = build("clip", "average_pool")
    samples = [processor.encode(document) for document in documents()]
    before = collate(samples, 0)
    samples[1].input_ids = samples[1].input_ids.copy()
    text = samples[1].input_ids != processor.image_token_id
    samples[1].input_ids[text] = (samples[1].input_ids[text] + 7) % 290 + 3
    samples[1].pixels = [255 - image for image in samples[1].pixels]
    after = collate(samples, 0)
    with torch.no_grad():
        first, second = logits_of(model, before), logits_of(model, after)
    start, stop = before.cu_seqlens[1:3].tolist()
    assert (first[start:stop] - second[start:stop]).abs().max() > 1e-2
    assert torch.equal(first[:start], second[:start])
    assert torch.equal(first[stop:], second[stop:])


def test_a_pack_is_isolated_whatever_use_cache_says(build: Callable[..., Any]) -> None:
    model, processor = build()
    pack = collate([processor.encode(document) for document in documents()], 0)
    with torch.no_grad():
        expected = logits_of(model, pack)
        for use_cache in (True, False):
            assert torch.equal(logits_of(model, pack, use_cache=use_cache), expected)
        model.config.use_cache = model.language_model.config.use_cache = True
        assert torch.equal(logits_of(model, pack), expected)
        output = model(
            pack.input_ids[None],
            pack.pixels,
            pack.sizes,
            cu_seqlens=pack.cu_seqlens,
            labels=pack.labels,
        )
    torch.testing.assert_close(output.logits[0], expected)
    learned = pack.labels[1:] != IGNORED
    expected_loss = loss_of(expected, pack.labels) / learned.sum()
    torch.testing.assert_close(output.loss, expected_loss)


def test_across_documents_is_one_segment(build: Callable[..., Any]) -> None:
    model, processor = build()
    pack = collate([processor.encode(document) for document in documents()], 0, True)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, pack), logits_of(model, pack, packed=False))


def test_gradient_checkpointing_keeps_the_bounds(build: Callable[..., Any]) -> None:
    model, processor = build()
    model.train()
    pack = collate([processor.encode(document) for document in documents()], 0)
    loss_of(logits_of(model, pack), pack.labels).backward()
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    loss_of(logits_of(model, pack), pack.labels).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name])
