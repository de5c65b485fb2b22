from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PillowImage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from data_packing.balance import PackCost
from mllm.recipe import load
from mllm.training import build
from mllm.training.pack_cost import (
    COMMON,
    fusion_cost,
    pack_cost,
    pair_cost,
    patch_cost,
    token_cost,
)
from tests.training import tiny

# of tiny.py: one token through the language model's matrices, one patch through the encoder
LAYER = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 36
VISION_LAYER = 4 * 20 * 20 + 2 * 20 * 28


def model_of(home: Path, tmp_path: Path, **changes: Any) -> tuple[Any, Any, Any]:
    file = tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe(home, tmp_path / "out", **changes))
    recipe = load(file)
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    return model, processor, recipe


def test_a_token_costs_two_passes_of_every_weight_and_a_third_where_it_learns(
    home: Path, tmp_path: Path
) -> None:
    frozen, *_ = model_of(home, tmp_path, train__language_model="frozen")
    learning, *_ = model_of(home, tmp_path, train__language_model={"lr": 1e-3})
    rows = frozen.get_input_embeddings().num_embeddings
    weights = 2 * LAYER + rows * 24
    assert token_cost(frozen.language_model) == 2 * weights
    assert token_cost(learning.language_model) == 3 * weights


def test_rows_of_an_embedding_are_looked_up_and_cost_nothing() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    costs = [
        token_cost(LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)))
        for tied in (True, False)
    ]
    assert costs[0] == costs[1] == 3 * (4 * 8 * 8 + 3 * 8 * 12 + 50 * 8)


def test_adapters_add_their_own_weights(home: Path, tmp_path: Path) -> None:
    how = {"lr": 1e-3, "lora": {"rank": 2}}
    adapted, *_ = model_of(home, tmp_path, train__language_model=how)
    frozen, *_ = model_of(home, tmp_path, train__language_model="frozen")
    extra = sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n)
    expected = token_cost(frozen.language_model) + 3 * extra
    assert token_cost(adapted.language_model) == expected


def test_pairs_and_patches_cost_what_their_products_take(home: Path, tmp_path: Path) -> None:
    model, *_ = model_of(home, tmp_path)
    assert pair_cost(model.language_model.config) == 3 * 2 * 24
    layers = len(model.encoder.vision.encoder.layers)
    tokens = 5  # a class token and four patches, which attend to each other
    one_image = 4 * 48 * 20 + layers * tokens * (VISION_LAYER + 2 * tokens * 20)
    assert patch_cost(model.encoder) == pytest.approx(one_image / 4)
    model.encoder.requires_grad_(True)
    assert patch_cost(model.encoder) == pytest.approx(3 * one_image / 4)
    assert next(model.encoder.parameters()).device.type == "cpu"


def test_layers_of_a_fusion_cost_tokens_and_patches(home: Path, tmp_path: Path) -> None:
    spec = {"name": "cross_attention", "layers": [1], "heads": 3, "head_width": 5, "inner": 40}
    fused = {"model__fusion": spec, "train__fusion": {"lr": 1e-3}}
    model, processor, recipe = model_of(home, tmp_path, **fused)
    plain, other, same = model_of(home, tmp_path)
    assert fusion_cost(plain, other) == (0.0, 0.0)
    matrices = 3 * (2 * 24 * 15 + 2 * 24 * 40)
    products = 3 * 2 * 15 * 4  # an image has four visual tokens, of as many patches
    assert fusion_cost(model, processor) == (matrices + products, 3 * 2 * 24 * 15)
    costs = [pack_cost(recipe, model, processor), pack_cost(same, plain, other)]
    assert costs[0] is not None
    assert costs[1] is not None
    assert costs[0].pairs < costs[1].pairs


@pytest.mark.parametrize(
    "images", [{"tiling": "dynamic", "tiles": 6}, {"tiling": "any_resolution"}, None]
)
def test_the_layers_of_a_fusion_compute_what_is_reckoned(
    home: Path, tmp_path: Path, images: dict[str, Any] | None
) -> None:
    """A forward pass over an image of common size, counted: a third of what training takes."""
    spec = {"name": "cross_attention", "layers": [0, 1], "heads": 2, "head_width": 8, "inner": 40}
    fused = {"model__fusion": spec, "train__fusion": {"lr": 1e-3}, "model__images": images}
    model, processor, _ = model_of(home, tmp_path, **fused)
    image = PillowImage.new("RGB", COMMON[::-1])
    inputs = processor(text="<image>a red chair", images=[image])
    counted, began = [], []
    for layer in model.fusion.layers.values():
        layer.register_forward_pre_hook(lambda *_: began.append(counter.get_total_flops()))
        layer.register_forward_hook(
            lambda *_: counted.append(counter.get_total_flops() - began[-1])
        )
    plain = sdpa_kernel(SDPBackend.MATH)  # the products of others are not counted
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        model(**inputs)
    layout = processor.layout(*COMMON)
    assert len(inputs["sizes"]) == len(layout.sizes)
    assert (layout.visual > 4) == (images is not None)
    shown = (inputs["input_ids"][0] == processor.image_token_id).nonzero().item()
    sees = inputs["input_ids"].shape[1] - shown
    token, patch = fusion_cost(model, processor)
    assert 3 * sum(counted) / 2 == sees * token + layout.patches * patch


def test_the_recipe_decides(home: Path, tmp_path: Path) -> None:
    model, processor, recipe = model_of(home, tmp_path)
    cost = pack_cost(recipe, model, processor)
    assert cost is not None
    assert cost.pairs == pytest.approx(144 / token_cost(model.language_model), rel=0.01)
    packing = {"tokens": 64, "balance": {"pairs": 0.5, "patches": 2.0}}
    *_, given = model_of(home, tmp_path, data__packing=packing)
    assert pack_cost(given, model, processor) == PackCost(1.0, 0.5, 2.0)
    *_, off = model_of(home, tmp_path, data__packing={"tokens": 64, "balance": False})
    assert pack_cost(off, model, processor) is None
