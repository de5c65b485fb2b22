"""Layer-wise decay of the learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from mllm.recipe import OptimizerSection, TrainSection
from mllm.training import groups, lora
from mllm.training.layers import layer_rates, stack_of
from tests.training.test_adapters import adapted, plain


class Encoder(nn.Module):
    """Patches, three layers, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)


def test_the_input_learns_most_slowly() -> None:
    model = nn.ModuleDict({"encoder": Encoder()})
    rates = layer_rates(model, "encoder", 0.5)
    assert rates["encoder.patches.weight"] == (0, 0.0625)
    assert [rates[f"encoder.layers.{i}.bias"] for i in range(3)] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.5),
    ]
    assert rates["encoder.norm.weight"] == (4, 1.0)
    assert rates.keys() == dict(model.named_parameters()).keys()


def test_groups_have_the_rates_of_their_layers(home: Path) -> None:
    model, _ = plain(home)
    train = {
        "encoder": TrainSection(lr=1e-3, layer_decay=0.5, warmup=0.2, weight_decay=0.0),
        "connector": TrainSection(weight_decay=0.3),
    }
    groups.freeze(model, train)
    optimizer = OptimizerSection(lr=2e-3, weight_decay=0.1, warmup=0.05)
    found = {group.name: group for group in groups.parameter_groups(model, train, optimizer)}
    assert {name for name in found if name.startswith("encoder")} == {
        "encoder/layer_0",
        "encoder/layer_0/no_decay",
        "encoder/layer_1",
        "encoder/layer_1/no_decay",
    }  # LLaVA's layer, the last but one, is the only one of these two, and nothing follows it
    assert found["encoder/layer_0"].lr == pytest.approx(1e-3 / 4)
    assert found["encoder/layer_1/no_decay"].lr == pytest.approx(1e-3 / 2)
    assert {found[name].warmup for name in found if name.startswith("encoder")} == {0.2}
    assert {found[name].weight_decay for name in found if name.startswith("encoder")} == {0.0}
    assert found["connector"].weight_decay == 0.3
    assert found["connector/no_decay"].weight_decay == 0.0
    assert (found["connector"].lr, found["connector"].warmup) == (2e-3, 0.05)


def test_adapters_decay_by_layer_too(home: Path) -> None:
    model, _ = plain(home)
    train = {"language_model": adapted("lora", layer_decay=0.5)}
    groups.freeze(model, train)
    lora.adapt(model, train, 0)
    found = groups.parameter_groups(model, train, OptimizerSection())
    assert [(group.name, group.lr) for group in found] == [
        ("language_model/layer_1", 1e-2 / 4),
        ("language_model/layer_2", 1e-2 / 2),
    ]


def test_a_module_without_one_stack_of_layers_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.connector\.layer_decay: connector has no stack"):
        layer_rates(plain(home)[0], "connector", 0.5)
    both = nn.ModuleDict({"first": Encoder(), "second": Encoder()})
    assert stack_of(both) is None
    assert stack_of(Encoder()) == ("layers", 3)
