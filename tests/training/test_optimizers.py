"""What a step of Muon is, and how moments in 8 bits go to other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllm.recipe import OptimizerSection, TrainSection, load
from mllm.training import eight_bit, engine, groups, lora
from tests.training import tiny
from tests.training.test_adapters import adapted, plain

MUON = OptimizerSection(name="muon", lr=1e-2, weight_decay=0.1)
EIGHT = OptimizerSection(name="adamw_8bit", lr=1e-2)


def made(model: nn.Module, train: dict[str, TrainSection], section: OptimizerSection) -> Any:
    """An optimizer over a model."""
    groups.freeze(model, train)
    lora.adapt(model, train, 0)
    found = groups.parameter_groups(model, train, section)
    return engine.make_optimizer(section, groups.optimizer_groups(model, found))


@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (16, 16)])
def test_a_step_of_muon_is_torchs_with_the_size_of_adams(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"connector": nn.Linear(shape[1], shape[0], bias=False)})
    ours: Any = model["connector"]
    theirs = nn.Parameter(ours.weight.detach().clone())
    optimizer = made(model, {"connector": TrainSection()}, MUON)
    reference = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.weight.grad = torch.randn(shape)
        theirs.grad = ours.weight.grad.clone()
        before = [weight.detach().clone() for weight in (ours.weight, theirs)]
        optimizer.step()
        reference.step()
        pairs = zip((ours.weight, theirs), before, strict=True)
        mine, torchs = (((after - old) / 1e-2).detach().flatten() for after, old in pairs)
        assert 0.1 < mine.square().mean().sqrt() < 0.3, "AdamW's usual step"
        assert mine.norm().item() == pytest.approx(torchs.norm().item(), rel=0.03)
        assert torch.cosine_similarity(mine, torchs, dim=0) > 0.995, "torch iterates in bf16"


def test_muon_is_for_matrices_of_hidden_layers(home: Path) -> None:
    model, _ = plain(home)
    train = {
        "encoder": TrainSection(),
        "connector": adapted("lora"),
        "language_model": TrainSection(),
    }
    optimizer = made(model, train, MUON)
    names = {id(p): n for n, p in model.named_parameters()}
    stepped: dict[bool, set[str]] = {True: set(), False: set()}
    for group in optimizer.param_groups:
        stepped[group["use_muon"]] |= {names[id(p)] for p in group["params"]}
        assert group["peak_lr"] in (1e-2, adapted("lora").lr)
        assert group["lr"] * group["weight_decay"] == pytest.approx(
            group["peak_lr"] * (0.0 if group["name"].endswith("no_decay") else 0.1)
        )
    assert "language_model.model.layers.0.mlp.up_proj.weight" in stepped[True]
    assert [name for name in stepped[True] if name.startswith("encoder.vision.")]
    for part in ("lora_", "embed", "lm_head", "norm", "bias"):
        assert not [name for name in stepped[True] if part in name], part
    assert [name for name in stepped[False] if "lora_A" in name]
    assert "language_model.model.embed_tokens.weight" in stepped[False]
    assert all(not name.endswith("patch_embedding.weight") for name in stepped[True])


def test_muon_runs_where_it_is_itself(home: Path, tmp_path: Path) -> None:
    def chosen(precision: str, zero: str | int) -> int:
        values = tiny.recipe(
            home, tmp_path, optimizer__name="muon", run__precision="auto", run__zero=zero
        )
        recipe = load(tiny.write_recipe(tmp_path / "recipe.yaml", values))
        return engine.choose_zero(recipe, precision, 2, 10**6, 10**6)[0]

    assert (chosen("fp32", "auto"), chosen("bf16", "auto")) == (0, 1)
    assert (chosen("fp32", 0), chosen("bf16", 1)) == (0, 1)
    with pytest.raises(ValueError, match=r"muon under run\.zero: 1 in fp32.*zero: 1 with bf16"):
        chosen("fp32", 1)


def stepped(sizes: list[int]) -> tuple[Any, list[Tensor]]:
    """An optimizer with moments in 8 bits after a few steps of pieces of these sizes."""
    torch.manual_seed(0)
    pieces = [nn.Parameter(torch.randn(size)) for size in sizes]
    group = {"params": pieces, "lr": 1e-2, "weight_decay": 0.0, "eight_bit": True}
    optimizer: Any = eight_bit.optimizer([group], (0.9, 0.95), 1e-8)
    for _ in range(4):
        for piece in pieces:
            piece.grad = torch.randn_like(piece) * torch.rand_like(piece).exp()
        optimizer.step()
    return optimizer, list(pieces)


def fresh(optimizer: Any, kept: dict[str, Tensor]) -> dict[str, Any]:
    """The state that a resumed run makes of what was kept."""
    piece, group = torch.zeros_like(kept["state1"], dtype=torch.float32), {"eight_bit": True}
    state = eight_bit.empty(optimizer, piece, group, 4)
    for key, value in kept.items():
        state[key].copy_(value)
    eight_bit.collapse(state)
    return state


def moments(state: dict[str, Any]) -> list[Tensor]:
    """Both moments in fp32."""
    eight_bit.expand(state)
    return [state[f"qmap{i}"][state[f"state{i}"].long()] * state[f"scale{i}"] for i in (1, 2)]


def test_moments_in_8_bits_are_resumed_to_the_bit() -> None:
    optimizer, (piece,) = stepped([1000])
    state = optimizer.state[piece]
    eight_bit.expand(state)
    again = fresh(optimizer, {key: state[key] for key in eight_bit.CODES + eight_bit.SCALES})
    assert again.keys() == state.keys() - set(eight_bit.SCALES)
    for key in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"):
        assert torch.equal(again[key], state[key]), key


def test_moments_in_8_bits_go_to_ranks_that_cut_them_elsewhere() -> None:
    optimizer, (piece,) = stepped([1000])
    state = optimizer.state[piece]
    expected = moments(state)
    kept = {key: state[key] for key in eight_bit.CODES + eight_bit.SCALES}
    first, second = (
        {key: t[part] for key, t in kept.items()} for part in (slice(300), slice(300, None))
    )
    got = [moments(fresh(optimizer, part)) for part in (first, second)]
    for i, whole in enumerate(expected):
        there = torch.cat([part[i] for part in got])
        assert torch.equal(there[:256], whole[:256]), "the first block is cut as before"
        assert not torch.equal(there[256:], whole[256:])
        error = (there - whole).abs()
        assert error.max() < 0.02 * whole.abs().max()


def test_vectors_and_embeddings_keep_moments_in_fp32(home: Path) -> None:
    model, _ = plain(home)
    optimizer = made(model, {"language_model": TrainSection()}, EIGHT)
    for parameter in model.language_model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kinds: dict[torch.dtype, set[str]] = {torch.uint8: set(), torch.float32: set()}
    for name, parameter in model.language_model.named_parameters():
        kinds[optimizer.state[parameter]["state1"].dtype].add(name.split(".")[-2])
    assert kinds[torch.float32] == {
        "embed_tokens",
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert "q_proj" in kinds[torch.uint8]


def test_every_group_has_its_own_course() -> None:
    class Engine:
        optimizer: Any

    warmed = [
        {"peak_lr": 1.0, "scale": 2.0, "warmup": 0.5},
        {"peak_lr": 0.1, "scale": 1.0, "warmup": 0.0},
    ]
    found = Engine()
    found.optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], **g} for g in warmed]
    )
    section = OptimizerSection(schedule="constant")
    assert engine.set_lr(found, 0, 10, section) == pytest.approx(1 / 6)
    assert [group["lr"] for group in found.optimizer.param_groups] == pytest.approx([2 / 6, 0.1])
    assert engine.set_lr(found, 5, 10, section) == 1.0
