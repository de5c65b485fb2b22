"""Fusions: what they all do, the seam by which they reach a language model, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from data_packing.document import Document
from data_packing.pack import collate
from mllm.models.assemble import load
from mllm.models.fusion import FUSIONS, Hook, hooked
from mllm.models.fusion.hooks import FORGETS_HOOKS, decoder_layers
from tests.models.conftest import (
    make_tokenizer,
    open_gates,
    picture,
    save_language_model,
)
from tests.models.fused import CROSS, logits, packed, text_logits

# -- what every fusion does ------------------------------------------------------------------------


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


def test_a_hook_reaches_a_part_of_a_layer(build: Callable[..., Any], tmp_path: Path) -> None:
    """So that features can be added inside q, k or v of chosen layers."""
    folder = save_language_model(tmp_path, num_hidden_layers=3, head_dim=16)
    model, processor = build("clip", "mlp", folder)
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
