"""Gated cross-attention: what the text model keeps of itself, and who sees which image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from data_packing.document import Document, Image, Text
from mllm.models.fusion.segments import Segments, attend, sight
from mllm.models.modeling import MultimodalModel
from tests.models.conftest import (
    chat,
    documents,
    llama_config,
    make_tokenizer,
    open_gates,
    picture,
    save_language_model,
)
from tests.models.fused import CROSS, logits, packed, text_logits

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 16}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Families of three layers each."""
    root = tmp_path_factory.mktemp("language_models")
    for name, (kind, changes) in FAMILIES.items():
        torch.manual_seed(0)
        values = {**llama_config(num_hidden_layers=3).to_dict(), **changes}
        for key in ("model_type", "architectures", "rope_parameters", "head_dim", "layer_types"):
            if key not in changes:
                values.pop(key, None)
        AutoModelForCausalLM.from_config(kind(**values)).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


# -- the text model inside -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_step_the_logits_are_the_text_models_bit_for_bit(
    build: Callable[..., Any], language_models: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    model, processor = build("clip", "mlp", language_models[family], dtype, fusion=CROSS)
    pack, one = packed(processor), processor.prompt(Document(chat(1).parts[:2]))
    ids = one["input_ids"]
    with torch.no_grad():
        assert torch.equal(logits(model, pack), text_logits(model, pack))
        assert torch.equal(model(**one).logits, model.language_model(input_ids=ids).logits)
        open_gates(model)
        assert (logits(model, pack) - text_logits(model, pack)).abs().max() > 1e-3


def test_text_without_images_stays_the_text_models_when_gates_are_open(
    build: Callable[..., Any],
) -> None:
    model, processor = build(fusion=CROSS)
    open_gates(model)
    pack = packed(processor)
    with torch.no_grad():
        same = (logits(model, pack) == text_logits(model, pack)).all(dim=1)
    bounds = pack.cu_seqlens.tolist()
    slots = pack.input_ids == processor.image_token_id
    for low, high in pairwise(bounds):
        first = [*slots[low:high].nonzero().flatten().tolist(), high - low][0]
        assert same[low : low + first].all()
        assert not same[low + first : high].any()
    assert same[bounds[-2] :].all(), "the last document has no image"


def test_gates_learn_first_and_then_the_path_behind_them(build: Callable[..., Any]) -> None:
    model, processor = build(fusion=CROSS)
    model.train()
    pack = packed(processor)

    def backward() -> dict[str, float]:
        model.zero_grad()
        loss = nn.functional.cross_entropy(logits(model, pack)[:-1], pack.labels[1:])
        loss.backward()
        found = model.named_parameters()
        return {name: float(p.grad.abs().max()) for name, p in found if p.grad is not None}

    before = backward()
    for name, size in before.items():
        if name.startswith(("fusion", "connector", "encoder")):
            assert (size > 0) == name.endswith("_gate"), name
    open_gates(model)
    after = backward()
    assert all(size > 0 for name, size in after.items() if name.startswith("fusion"))
    assert after["connector.second.weight"] > 0
    assert max(size for name, size in after.items() if name.startswith("encoder")) > 0


# -- who sees which image --------------------------------------------------------------------------


def test_a_token_sees_the_last_image_before_it_in_its_document_or_all_of_them() -> None:
    places, images, bounds = [2, 5, 6, 14], [3, 1, 2, 4], [0, 4, 10, 12, 20]
    last = sight(places, images, bounds, only_last=True)
    assert last.texts == ((2, 4), (5, 6), (6, 10), (14, 20))
    assert last.tokens == ((0, 3), (3, 4), (4, 6), (6, 10))
    every = sight(places, images, bounds, only_last=False)
    assert every.texts == last.texts
    assert every.tokens == ((0, 3), (3, 4), (3, 6), (6, 10))


@pytest.mark.parametrize("only_last", [True, False])
def test_attention_by_segments_is_attention_under_a_dense_mask(only_last: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        tokens = int(rng.integers(8, 40))
        bounds = [0, *sorted(rng.choice(np.arange(1, tokens), 3, replace=False).tolist()), tokens]
        places = sorted(rng.choice(tokens, int(rng.integers(1, 7)), replace=False).tolist())
        images = rng.integers(1, 5, len(places)).tolist()
        owner = torch.arange(len(places)).repeat_interleave(torch.tensor(images))
        document = np.searchsorted(bounds, np.arange(tokens), side="right")
        seen = torch.zeros(tokens, len(owner), dtype=torch.bool)
        for token in range(tokens):
            mine = [
                i for i, p in enumerate(places) if p <= token and document[p] == document[token]
            ]
            for image in mine[-1:] if only_last else mine:
                seen[token] |= owner == image
        query = torch.randn(tokens, 2, 8)
        key, value = torch.randn(2, len(owner), 2, 8)
        segments = sight(places, images, bounds, only_last).segments(query.device)
        assert segments.where.tolist() == seen.any(1).nonzero().flatten().tolist()
        expected = nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (query[segments.where], key, value)),
            attn_mask=seen[segments.where],
        ).transpose(0, 1)
        found = attend(query[segments.where], key, value, segments)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_segments_may_repeat_tokens() -> None:
    key, value = torch.randn(2, 3, 1, 8)
    query = torch.randn(2, 1, 8)
    both = Segments(torch.arange(2), (1, 1), (2, 2), torch.tensor([0, 2, 0, 2]))
    found = attend(query, key, value, both)
    kept = Segments(torch.arange(2), (2,), (2,))
    torch.testing.assert_close(found, attend(query, key[[0, 2]], value[[0, 2]], kept))


def test_only_the_last_image_or_all_of_them(build: Callable[..., Any]) -> None:
    """One fused layer, the last: the text around it cannot carry the first image further."""
    page = Document((picture(1), Text("a red chair"), picture(2), Text("a green parrot")))
    reach = []
    for only in (True, False):
        spec = {"name": "cross_attention", "layers": [1], "only_immediate": only}
        model, processor = build(fusion=spec)
        open_gates(model)
        nn.init.zeros_(model.language_model.model.layers[1].self_attn.o_proj.weight)
        pack = packed(processor, [page])
        other = packed(processor, [Document((picture(9), *page.parts[1:]))])
        assert torch.equal(pack.input_ids, other.input_ids)
        with torch.no_grad():
            changed = (logits(model, pack) != logits(model, other)).any(dim=1)
        second = (pack.input_ids == processor.image_token_id).nonzero()[1].item()
        assert changed[second - 1]
        reach.append(bool(changed[second:].any()))
    assert reach == [False, True]


@pytest.mark.parametrize("spec", [CROSS, {**CROSS, "only_immediate": False}], ids=["last", "all"])
def test_another_document_changes_nothing(build: Callable[..., Any], spec: Any) -> None:
    model, processor = build("clip", "average_pool", fusion=spec)
    open_gates(model)
    chosen = documents()
    before = packed(processor, chosen)
    page = [picture(70 + n) if isinstance(p, Image) else p for n, p in enumerate(chosen[1].parts)]
    after = packed(processor, [chosen[0], Document(tuple(page)), *chosen[2:]])
    assert torch.equal(before.input_ids, after.input_ids)
    with torch.no_grad():
        first, second = logits(model, before), logits(model, after)
    low, high = before.cu_seqlens[1:3].tolist()
    assert (first[low:high] - second[low:high]).abs().max() > 1e-3
    assert torch.equal(first[:low], second[:low])
    assert torch.equal(first[high:], second[high:])


# -- the sequence and the cache --------------------------------------------------------------------


def test_an_image_takes_one_token_and_the_patches_it_took(build: Callable[..., Any]) -> None:
    _, plain = build("clip", "average_pool")
    _, processor = build("clip", "average_pool", fusion=CROSS)
    assert plain.image_cost(40, 56) == (4, 16)
    assert processor.image_cost(40, 56) == (1, 16)
    sample = processor.encode(documents()[1])
    assert [slot.length for slot in sample.slots] == [1, 1]
    assert [sample.input_ids[slot.start] for slot in sample.slots] == [processor.image_token_id] * 2
    cost = processor.cost(documents()[1])
    assert len(sample.input_ids) == cost.overhead + sum(n for n, _ in cost.pieces) + 2
    assert processor.fingerprint != plain.fingerprint
    assert processor.text_fingerprint == plain.text_fingerprint


@pytest.mark.parametrize("spec", [CROSS, {**CROSS, "only_immediate": False}], ids=["last", "all"])
def test_a_cache_keeps_what_its_rows_see(build: Callable[..., Any], spec: Any) -> None:
    """Rows of two images, one and none; the layers' keys are computed once."""
    model, processor = build("clip", "average_pool", fusion=spec)
    open_gates(model)
    page = Document((picture(1), Text("a cat"), picture(2), Text(" the")))
    asked = [page, Document((picture(3), Text("a red"))), Document((Text("the cat sat on"),))]
    inputs = processor.prompts(asked)
    keys: list[int] = []
    for layer in model.fusion.layers.values():
        layer.key.register_forward_hook(lambda *_: keys.append(1))
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = model(**inputs, position_ids=positions, use_cache=True)
        mask, rows = inputs["attention_mask"], [*inputs["input_ids"].split(1)]
        for new in ([5, 6, 7], [8, 9, 10]):
            ids = torch.tensor(new)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            out = model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=out.past_key_values,
            )
            rows = [torch.cat([row, one[None]], dim=1) for row, one in zip(rows, ids, strict=True)]
        assert len(keys) == 2
        for row, seen, one, got in zip(rows, mask, asked, out.logits[:, -1], strict=True):
            alone = processor.prompt(one)
            whole = model(**{**alone, "input_ids": row[:, seen == 1], "attention_mask": None})
            torch.testing.assert_close(got, whole.logits[0, -1], rtol=0, atol=1e-5)
        other = copy.deepcopy(out.past_key_values)
        other.crop(-int(other.get_seq_length()))
        assert int(other.get_seq_length()) == 0
        ids = inputs["input_ids"][2:].expand(3, -1)
        text = [model(some, past_key_values=other).logits for some in ids.split(2, dim=1)]
        whole = model(ids).logits
        torch.testing.assert_close(torch.cat(text, dim=1), whole, rtol=0, atol=1e-5)


def test_images_into_a_cache_that_has_tokens_are_refused(build: Callable[..., Any]) -> None:
    model, processor = build(fusion=CROSS)
    inputs = processor.prompt(Document((picture(1), Text("a cat"))))
    with torch.no_grad():
        cache = model(inputs["input_ids"][:, 1:] * 0 + 3, past_key_values=DynamicCache())
        views = {name: inputs[name] for name in ("input_ids", "pixels", "sizes")}
        with pytest.raises(ValueError, match="images come with the first call of a cache"):
            model(**views, past_key_values=cache.past_key_values)
        cache = model(**views, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="images of 1 rows, but 2 rows go on"):
            model(torch.tensor([[5], [6]]), past_key_values=cache)


def test_images_that_do_not_agree_are_counted(build: Callable[..., Any]) -> None:
    model, processor = build(fusion=CROSS)
    pack = packed(processor, [chat(1), chat(2)])
    line = "the text has 2 image tokens, but there are 1 images"
    with pytest.raises(ValueError, match=line):
        model(pack.input_ids, pack.pixels[: 3 * 32 * 32], pack.sizes[:1])
    with pytest.raises(ValueError, match="2 image tokens, but there are 0 images"):
        model(pack.input_ids)


@pytest.mark.parametrize("offloaded", ["fusion", "language_model"])
def test_offloaded_layers_compute_the_same(
    build: Callable[..., Any], tmp_path: Path, offloaded: str
) -> None:
    model, processor = build(fusion=CROSS)
    open_gates(model).save_pretrained(tmp_path / "saved")
    parts = ("encoder", "connector", "fusion", "language_model")
    split = MultimodalModel.from_pretrained(
        tmp_path / "saved",
        device_map={**dict.fromkeys(parts, "cpu"), offloaded: "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    assert all(weight.is_meta for weight in split.get_submodule(offloaded).parameters())
    inputs = processor.prompt(Document((picture(1), Text("a cat"))))
    with torch.no_grad():
        assert torch.equal(split(**inputs).logits, model(**inputs).logits)


def test_the_layers_that_are_chosen(build: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_language_model(tmp_path, num_hidden_layers=9)
    for spec, expected in (
        ({}, ["0", "4", "8"]),
        ({"every": 3}, ["0", "3", "6"]),
        ({"layers": [2, 7]}, ["2", "7"]),
    ):
        model, _ = build("clip", "mlp", folder, fusion={"name": "cross_attention", **spec})
        assert list(model.fusion.layers) == expected
