"""Which parameter learns how, the course of the rate, and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from mllm.recipe import LoraSection, OptimizerSection, TrainSection
from mllm.training import groups, lora
from mllm.training.loop import seed


class Body(nn.Module):
    """Two layers and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q_proj = nn.Linear(6, 6)
        self.up_proj = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight


class Whole(nn.Module):
    """Shaped as a model is."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.connector = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
        self.language_model = Body()


def section(lr: float | None = None, **values: Any) -> TrainSection:
    """A `train:` value."""
    return TrainSection(lr=lr, **values)


def made(model: nn.Module, train: Mapping[str, TrainSection]) -> dict[str, groups.Group]:
    """Freeze and group; groups by name."""
    groups.freeze(model, train)
    return {
        g.name: g for g in groups.parameter_groups(model, train, OptimizerSection(weight_decay=0.1))
    }


def test_the_longest_path_wins() -> None:
    found = made(
        Whole(),
        {
            "connector": section(1e-3),
            "connector.1": section(5e-4),
            "language_model": section(1e-5),
            "language_model.norm": section(frozen=True),
        },
    )
    assert found["connector"].parameters == ("connector.0.weight",)
    assert found["connector"].lr == 1e-3
    assert found["connector.1/no_decay"].parameters == ("connector.1.bias",)
    assert found["connector.1/no_decay"].weight_decay == 0.0
    assert found["connector.1"].weight_decay == 0.1
    names = {name for group in found.values() for name in group.parameters}
    assert "language_model.embed.weight" in names
    assert not [name for name in names if "norm" in name or "encoder" in name]


def test_a_path_is_matched_at_dots_only() -> None:
    assert groups.longest_match("connector.10.weight", ["connector.1"]) is None
    assert groups.longest_match("connector.1.weight", ["connector", "connector.1"]) == "connector.1"


def test_an_unknown_path_names_the_nearest() -> None:
    train = {"language_model.nrom": section(1e-3)}
    with pytest.raises(ValueError, match=r"did you mean 'language_model.norm'"):
        groups.freeze(Whole(), train)


def test_a_key_through_which_nothing_learns_is_refused() -> None:
    train = {"language_model.lm_head": section(1e-3)}
    with pytest.raises(ValueError, match=r"train.language_model.lm_head: nothing would learn"):
        made(Whole(), train)


def test_adapters_alone_learn() -> None:
    model = Whole()
    train = {"language_model": section(1e-3, lora=LoraSection(rank=2))}
    groups.freeze(model, train)
    config = lora.inject(model.language_model, LoraSection(rank=2))
    assert set(config.target_modules or ()) == {"q_proj", "up_proj"}
    found = groups.parameter_groups(model, train, OptimizerSection(weight_decay=0.1))
    names = {name for group in found for name in group.parameters}
    assert len(names) == 4
    assert all(".lora_" in name for name in names)


def test_a_module_beside_adapters_can_learn_in_full() -> None:
    model = Whole()
    train = {
        "language_model": section(1e-3, lora=LoraSection(rank=2)),
        "language_model.norm": section(1e-4),
    }
    groups.freeze(model, train)
    lora.inject(model.language_model, LoraSection(rank=2))
    found = {
        g.name: g for g in groups.parameter_groups(model, train, OptimizerSection(weight_decay=0.1))
    }
    assert set(found["language_model.norm/no_decay"].parameters) == {
        "language_model.norm.weight",
        "language_model.norm.bias",
    }


def test_a_layer_is_not_trained_in_full_under_an_adapter() -> None:
    model = Whole()
    groups.freeze(model, {"language_model.q_proj": section(1e-3)})
    with pytest.raises(ValueError, match="carries an adapter too"):
        lora.inject(model.language_model, LoraSection(rank=2))


def test_merging_adds_the_scaled_product_in_fp32() -> None:
    model = Whole().bfloat16().requires_grad_(False)
    base = model.language_model.q_proj.weight.detach().clone()
    lora.inject(model.language_model, LoraSection(rank=2, alpha=6))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    prefix = "language_model.q_proj"
    a, b = torch.randn(2, 6), torch.randn(6, 2)
    weights[f"{prefix}.lora_A.default.weight"] = a
    weights[f"{prefix}.lora_B.default.weight"] = b
    merged = lora.merged(weights, model)
    assert torch.equal(merged[f"{prefix}.weight"], (base.float() + 3.0 * (b @ a)).bfloat16())
    assert set(merged) == {name for name, _ in Whole().named_parameters()}


def test_a_pack_draws_the_same_masks_wherever_it_is_computed() -> None:
    def draw(*where: int) -> torch.Tensor:
        seed(*where)
        return torch.rand(4)

    assert torch.equal(draw(0, 3, 12), draw(0, 3, 12))
    different = [draw(0, 3, 12), draw(0, 3, 13), draw(0, 4, 12), draw(1, 3, 12), draw(0, 3, -1)]
    for i, one in enumerate(different):
        assert not any(torch.equal(one, other) for other in different[i + 1 :])
