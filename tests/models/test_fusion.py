"""Fusions: what the language model keeps of itself, who sees which image, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from data_packing.document import Document, Image, Text
from data_packing.pack import Pack, collate
from mllm.models import attention
from mllm.models.assemble import load
from mllm.models.fusion import FUSIONS, Hook, hooked
from mllm.models.fusion.hooks import FORGETS_HOOKS, decoder_layers
from mllm.models.fusion.segments import Segments, attend, sight
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.conftest import (
    chat,
    documents,
    llama_config,
    make_tokenizer,
    open_gates,
    picture,
    save_language_model,
)

CROSS = {"name": "cross_attention", "every": 1}
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


def packed(processor: Processor, chosen: list[Document] | None = None) -> Pack:
    return collate([processor.encode(one) for one in chosen or documents()], 0)


def logits(model: MultimodalModel, pack: Pack) -> Tensor:
    hidden = model.hidden_states(
        pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
    )
    return model.lm_head(hidden)[0]


def text_logits(model: MultimodalModel, pack: Pack) -> Tensor:
    """What the language model alone makes of the same ids."""
    language: Any = model.language_model
    with attention.packed_call(language.base_model, language.config.num_hidden_layers):
        hidden = language.base_model(
            pack.input_ids[None],
            position_ids=pack.position_ids[None],
            cu_seqlens=pack.cu_seqlens,
            use_cache=False,
        ).last_hidden_state
    return model.lm_head(hidden)[0]


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


@pytest.mark.skipif(not FORGETS_HOOKS, reason="this transformers checkpoints without hooks")
@pytest.mark.parametrize("fusion", ["cross_attention", "deepstack"])
def test_gradient_checkpointing_that_forgets_hooks_is_refused(
    build: Callable[..., Any], fusion: str
) -> None:
    model, processor = build(fusion=fusion)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"before 5\.23 .*turn it off"):
        logits(model, packed(processor))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradient_checkpointing_changes_no_gradient(build: Callable[..., Any], fusion: str) -> None:
    if FORGETS_HOOKS and fusion != "in_sequence":
        pytest.skip("transformers before 5.23 runs hooked layers again; refused, see above")
    model, processor = build(fusion=fusion)
    open_gates(model).train()
    found = []
    for _ in range(2):
        model.zero_grad()
        logits(model, packed(processor)).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], msg=name)
    layers = [m for m in model.fusion.modules() if hasattr(m, "gradient_checkpointing")]
    assert all(layer.gradient_checkpointing for layer in layers)
    assert bool(layers) == (fusion == "cross_attention")


# -- the sequence, the cache, the folder -----------------------------------------------------------


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


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_folder_keeps_the_fusion(build: Callable[..., Any], tmp_path: Path, fusion: str) -> None:
    model, processor = build("clip", "mlp", fusion=fusion)
    open_gates(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load(tmp_path)
    assert type(again.fusion) is FUSIONS[fusion]
    assert again.config.fusion == model.config.fusion == same.fusion
    assert AutoConfig.from_pretrained(tmp_path).fusion.get("name", "in_sequence") == fusion
    assert same.fingerprint == processor.fingerprint
    with torch.no_grad():
        assert torch.equal(logits(again, packed(same)), logits(model, packed(processor)))


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


def test_a_folder_that_is_older_than_fusions_loads(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    model, processor = build("clip", "mlp")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("config.json", "processor_config.json"):
        values = json.loads((tmp_path / name).read_text())
        assert values.pop("fusion") == {}
        (tmp_path / name).write_text(json.dumps(values))
    again, same = load(tmp_path)
    assert same.fingerprint == processor.fingerprint
    with torch.no_grad():
        assert torch.equal(logits(again, packed(same)), logits(model, packed(processor)))


# -- the seam --------------------------------------------------------------------------------------


def test_deepstack_adds_a_level_after_each_layer(build: Callable[..., Any]) -> None:
    """By hand: the layers one after another, with sums in between."""
    model, processor = build("clip", "mlp", fusion={"name": "deepstack", "layers": [1]})
    sample = processor.encode(Document.caption(picture(1), "a red chair"))
    pack = collate([sample], 0)
    ids = pack.input_ids[None]
    body: Any = model.language_model.base_model
    with torch.no_grad():
        first, level = model.image_features(pack.pixels, pack.sizes).split(32, dim=1)
        (slot,) = sample.slots
        span = slice(slot.start, slot.start + slot.length)
        hidden = model.get_input_embeddings()(ids)
        hidden[0, span] = first
        cos_sin = body.rotary_emb(hidden, pack.position_ids[None])
        for number, layer in enumerate(body.layers):
            hidden = layer(hidden, attention_mask=None, position_embeddings=cos_sin)
            if number == 1:
                hidden[0, span] += level
        expected = model.lm_head(body.norm(hidden))
        found = model(ids, pack.pixels, pack.sizes).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_hook_reaches_a_part_of_a_layer(
    build: Callable[..., Any], language_models: dict[str, Path]
) -> None:
    """So that features can be added inside q, k or v of chosen layers."""
    model, processor = build("clip", "mlp", language_models["qwen3"])
    body, pack = model.language_model.base_model, packed(processor)
    asked: list[tuple[torch.Size, torch.Size]] = []

    def change(leaving: Tensor, entered: Tensor) -> Tensor:
        asked.append((leaving.shape, entered.shape))
        return leaving + 0.5

    hook = Hook(1, change, after=True, part="self_attn.v_proj")
    with torch.no_grad():
        plain = text_logits(model, pack)
        with hooked(body, 3, [hook]):
            changed = text_logits(model, pack)
        assert len(asked) == 1
        assert asked[0][0][-1] == 2 * 16
        assert asked[0][1][-1] == 32
        assert (changed - plain).abs().max() > 1e-3
        assert torch.equal(text_logits(model, pack), plain), "the hook is gone"
        body.layers[1].self_attn.v_proj.bias = nn.Parameter(torch.full((32,), 0.5))
        torch.testing.assert_close(text_logits(model, pack), changed)


def test_hooks_that_cannot_be_are_refused(build: Callable[..., Any]) -> None:
    model, _ = build()
    body = model.language_model.base_model
    keep: Any = lambda leaving, entered: leaving  # noqa: E731
    with (
        pytest.raises(ValueError, match="did not run its layer 1"),
        hooked(body, 2, [Hook(1, keep)]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="has no part self_attn.w"),
        hooked(body, 2, [Hook(1, keep, part="self_attn.w")]),
    ):
        pass
    model.gradient_checkpointing_enable()
    model.train()
    with (
        pytest.raises(ValueError, match=r"run self_attn\.q_proj again without"),
        hooked(body, 2, [Hook(1, keep, part="self_attn.q_proj")]),
    ):
        pass
    with pytest.raises(ValueError, match="no list of its 2 layers"):
        decoder_layers(nn.Linear(2, 2), 2)
    assert not any(layer._forward_pre_hooks for layer in body.layers)


def test_calls_of_two_threads_do_not_mix(build: Callable[..., Any]) -> None:
    """A hook acts in the call that it was put in for."""
    from threading import Thread

    model, _ = build()
    body = model.language_model.base_model
    begun: list[bool] = []
    seen: list[Tensor] = []

    def add(by: float, leaving: Tensor, entered: Tensor) -> Tensor:
        if by and not begun:  # the other call runs while this one's hooks are in place
            begun.append(True)
            thread = Thread(target=lambda: seen.append(run(0.0)))
            thread.start()
            thread.join()
        return leaving + by

    def run(by: float) -> Tensor:
        with torch.no_grad(), hooked(body, 2, [Hook(0, partial(add, by))]):
            return body(torch.arange(5)[None], use_cache=False).last_hidden_state

    plain = run(0.0)
    assert (run(3.0) - plain).abs().max() > 1e-3
    assert torch.equal(seen[0], plain)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "cross_atention"}, "did you mean 'cross_attention'"),
        ({"name": "cross_attention", "evry": 2}, "did you mean 'every'"),
        ({**CROSS, "layers": [0]}, "give every or layers, not both"),
        ({"name": "cross_attention", "layers": [2]}, "no layer 2; .* has 2 layers, 0 to 1"),
        ({"name": "cross_attention", "layers": [1, 0]}, r"layers must be \[0, 4, …\], rising, got"),
        ({"name": "cross_attention", "heads": 0}, "heads must be a whole number"),
        ({"name": "cross_attention", "only_immediate": 1}, "only_immediate must be true or false"),
        ({"name": "deepstack", "layers": []}, r"layers must be \[0, 4, …\], rising, got"),
        ({"name": "deepstack", "layers": [0, 5]}, "no layer 5"),
        ({"name": "in_sequence", "layers": [0]}, "unknown option of the fusion in_sequence"),
    ],
)
def test_a_bad_section_is_one_line(build: Callable[..., Any], spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        build(fusion=spec)
    assert "\n" not in str(refused.value)


def test_images_that_do_not_agree_are_counted(build: Callable[..., Any]) -> None:
    model, processor = build(fusion=CROSS)
    pack = packed(processor, [chat(1), chat(2)])
    line = "the text has 2 image tokens, but there are 1 images"
    with pytest.raises(ValueError, match=line):
        model(pack.input_ids, pack.pixels[: 3 * 32 * 32], pack.sizes[:1])
    with pytest.raises(ValueError, match="2 image tokens, but there are 0 images"):
        model(pack.input_ids)


def test_tiles_are_refused(build: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = build(fusion=CROSS)
    line = r"fusion cross_attention takes images whole; leave images\.tiling \(dynamic\) out"
    with pytest.raises(ValueError, match=line):
        processor.cutting({"tiling": "dynamic"})
    with pytest.raises(ValueError, match=r"leave images\.regions \(feature\) out"):
        build(fusion=CROSS, images={"regions": "feature"})
    build(fusion=CROSS, images={"regions": "decimals", "clip_tokens": 4})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=line):
        load(tmp_path, images={"tiling": "dynamic"})


def test_a_narrow_embedding_has_no_deepstack(build: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=300,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embeds tokens in 16 numbers and its layers have 32"):
        build("clip", "mlp", tmp_path, fusion="deepstack")
    model, processor = build("clip", "mlp", tmp_path, fusion=CROSS)
    open_gates(model)
    with torch.no_grad():
        logits(model, packed(processor))


def test_segments_may_repeat_tokens() -> None:
    key, value = torch.randn(2, 3, 1, 8)
    query = torch.randn(2, 1, 8)
    both = Segments(torch.arange(2), (1, 1), (2, 2), torch.tensor([0, 2, 0, 2]))
    found = attend(query, key, value, both)
    kept = Segments(torch.arange(2), (2,), (2,))
    torch.testing.assert_close(found, attend(query, key[[0, 2]], value[[0, 2]], kept))


def test_the_layers_that_are_chosen(build: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_language_model(tmp_path, num_hidden_layers=9)
    for spec, expected in (
        ({}, ["0", "4", "8"]),
        ({"every": 3}, ["0", "3", "6"]),
        ({"layers": [2, 7]}, ["2", "7"]),
    ):
        model, _ = build("clip", "mlp", folder, fusion={"name": "cross_attention", **spec})
        assert list(model.fusion.layers) == expected
