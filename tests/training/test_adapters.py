"""Adapters on every module, in one process: where gradients are, and what is merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from data_packing.pack import collate
from mllm.models.assemble import assemble
from mllm.recipe import LoraSection, ModelSection, OptimizerSection, TrainSection
from mllm.training import groups, lora, pack_cost, quantised
from mllm.training.parameters import parameter_table
from mllm.training.step import TrainStep
from tests.training import tiny
from tests.training.test_step import run, samples

KINDS = ("lora", "dora", "qlora")
PARTS = ("encoder", "connector", "language_model")
FROZEN = TrainSection(frozen=True)


def adapted(kind: str, rank: int = 2, **values: Any) -> TrainSection:
    """A module that learns through adapters."""
    return TrainSection.model_validate({"lr": 1e-2, kind: {"rank": rank}, **values})


def make(home: Path, train: dict[str, TrainSection]) -> tuple[Any, Any, dict[str, Any]]:
    """A step whose adapters change what it computes, its processor, and their configurations."""
    torch.manual_seed(0)
    model, processor = plain(home)
    groups.freeze(model, train)
    configs = lora.adapt(model, train, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
            elif ".lora_magnitude" in name:
                parameter.mul_(1.3)
    return TrainStep(model, ("language_modeling",), capacity=64).train(), processor, configs


def plain(home: Path) -> tuple[Any, Any]:
    """The model without adapters, the same every time."""
    torch.manual_seed(0)
    return assemble(ModelSection.model_validate(tiny.recipe(home, home)["model"]))


def everywhere(kind: str) -> dict[str, TrainSection]:
    """Adapters of one kind on all parts."""
    return {part: adapted(kind) for part in PARTS}


def hidden(model: Any, processor: Any) -> Tensor:
    """What the model computes of a few documents, before the head."""
    pack = collate(samples(processor), 0)
    with torch.no_grad():
        result: Tensor = model.eval().hidden_states(
            pack.input_ids[None],
            pack.pixels,
            pack.sizes,
            order=pack.order,
            position_ids=pack.position_ids[None],
            cu_seqlens=pack.cu_seqlens,
        )
    return result


def learned(step: TrainStep) -> dict[str, Tensor]:
    """Gradients that are not zero."""
    return {n: p.grad for n, p in step.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_where_they_should_be_and_nowhere_else(home: Path, kind: str) -> None:
    step, processor, _ = make(home, everywhere(kind))
    pack = collate(samples(processor), 0)
    run(step, pack).backward()
    got = learned(step)
    adapters = {name for name, _ in step.named_parameters() if ".lora_" in name}
    assert set(got) == adapters
    assert {name.split(".")[1] for name in adapters} == set(PARTS)
    assert all(p.grad is None for n, p in step.named_parameters() if n not in adapters)
    assert any("magnitude" in name for name in adapters) == (kind == "dora")

    step.zero_grad()
    again = checkpointed(step)
    run(step, pack).backward()
    assert again, "nothing was computed a second time"
    for name, gradient in learned(step).items():
        torch.testing.assert_close(gradient, got[name], msg=name)
    assert set(learned(step)) == set(got)


def checkpointed(step: Any) -> list[int]:
    """Turn gradient checkpointing on in both stacks; gathers a number per layer computed again."""
    found: list[int] = []
    for stack in (step.model.encoder.vision, step.model.language_model):
        stack.gradient_checkpointing_enable({"use_reentrant": False})
    attention = step.model.language_model.model.layers[0].self_attn
    calls = iter(range(10))
    attention.register_forward_hook(lambda *_: found.append(n) if (n := next(calls)) else None)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_merged_they_compute_the_same(home: Path, kind: str) -> None:
    step, processor, _ = make(home, everywhere(kind))
    wanted = hidden(step.model, processor)
    model, _ = plain(home)
    before = hidden(model, processor)
    assert (wanted - before).abs().max() > 0.1
    merged = lora.merged(weights(step.model), step.model)
    assert merged.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(merged, strict=False)
    torch.testing.assert_close(hidden(model, processor), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_reloaded_by_peft_they_compute_the_same(home: Path, kind: str, tmp_path: Path) -> None:
    step, processor, configs = make(home, everywhere(kind))
    wanted = hidden(step.model, processor)
    full, (model, _) = weights(step.model), plain(home)
    base = {p: w for n, w in full.items() if (p := lora.plain_name(n)) is not None}
    model.load_state_dict(base, strict=False)
    for key, config in configs.items():
        folder = tmp_path / lora.folder_name(key)
        lora.save(full, key, config, "", folder)
        module: Any = model.get_submodule(key)
        if key != "language_model":
            module.config = {}  # PEFT asks what a module of its own making does not have
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing.*")
            PeftModel.from_pretrained(module, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lora",
        "lora_connector",
        "lora_encoder",
    ]
    torch.testing.assert_close(hidden(model, processor), wanted, atol=1e-5, rtol=1e-5)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights, none in 4 bits."""
    return {n: quantised.plain(p, p.data).clone() for n, p in model.named_parameters()}


def test_only_what_says_qlora_is_quantised(home: Path) -> None:
    train = {"language_model": adapted("qlora"), "encoder": adapted("lora")}
    step, _, _ = make(home, train)
    packed = {n for n, p in step.model.named_parameters() if quantised.is_quantised(p)}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(packed) == 2 * len(layers)
    for name in packed:
        assert name.startswith("language_model.")
        assert name.split(".")[-3] in layers
    named = make(home, {"encoder": adapted("qlora")})[0].model
    packed = {n for n, p in named.named_parameters() if quantised.is_quantised(p)}
    assert packed
    assert all(name.startswith("encoder.") for name in packed)


def test_four_bits_are_counted_as_the_weights_they_are(home: Path) -> None:
    one = make(home, everywhere("lora"))[0].model
    four = make(home, everywhere("qlora"))[0].model
    for cost in (pack_cost.token_cost, pack_cost.patch_cost):
        name = "language_model" if cost is pack_cost.token_cost else "encoder"
        assert cost(getattr(four, name)) == cost(getattr(one, name))
    counts = [list(parameter_table(model).columns[1].cells) for model in (one, four)]
    assert counts[0] == counts[1]
    kinds = list(parameter_table(four, dtypes=True).columns[-1].cells)
    assert all("nf4" in kind for kind in kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_weights_is_counted_too(home: Path, kind: str) -> None:
    section = ModelSection.model_validate(tiny.recipe(home, home)["model"])
    model, _ = assemble(section, weights=False)
    groups.freeze(model, everywhere(kind))
    lora.adapt(model, everywhere(kind), seed=1)
    made = make(home, everywhere(kind))[0].model
    columns = ([list(c.cells) for c in parameter_table(m).columns] for m in (model, made))
    assert next(columns) == next(columns)


def test_a_layer_learns_as_its_longest_key_says(home: Path, tmp_path: Path) -> None:
    train = {
        "language_model": adapted("lora"),
        "language_model.model.layers.0": FROZEN,
        "language_model.model.layers.1.mlp": adapted("lora", rank=3),
        "language_model.model.layers.1.self_attn.q_proj": TrainSection(lr=1e-4),
    }
    step, processor, configs = make(home, train)
    run(step, collate(samples(processor), 0)).backward()
    names = {n.split("layers.")[1] for n in learned(step)}
    assert not [name for name in names if name.startswith("0.")]
    assert "1.self_attn.q_proj.weight" in names
    ranks = {
        n: p.shape[0] for n, p in step.named_parameters() if n.endswith("lora_A.default.weight")
    }
    assert {n.split(".")[-4]: r for n, r in ranks.items()} == {
        **dict.fromkeys(("k_proj", "v_proj", "o_proj"), 2),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 3),
    }
    made = groups.parameter_groups(step.model, train, OptimizerSection())
    assert {group.name: len(group.parameters) for group in made} == {
        "language_model": 6,
        "language_model.model.layers.1.mlp": 6,
        "language_model.model.layers.1.self_attn.q_proj": 1,
    }
    full = weights(step.model)
    mine = {n: w for n, w in full.items() if groups.longest_match(n, train) == "language_model"}
    lora.save(mine, "language_model", configs["language_model"], "", tmp_path)
    again: Any = PeftModel.from_pretrained(plain(home)[0].language_model, tmp_path)
    put = {n.split("layers.")[1] for n, _ in again.named_parameters() if ".lora_A." in n}
    assert put == {f"1.self_attn.{n}_proj.lora_A.default.weight" for n in ("k", "v", "o")}


def test_what_is_below_the_first_adapter_has_no_graph(home: Path) -> None:
    train = {"encoder": FROZEN, "connector": FROZEN, "language_model": adapted("lora")}
    train["language_model.model.layers.0"] = FROZEN
    step, processor, _ = make(home, train)
    model, below, above = step.model, [], []
    layers = model.language_model.model.layers
    for module in (model.encoder, model.connector, layers[0]):
        module.register_forward_hook(lambda *args: below.append(args[-1]))
    layers[1].register_forward_hook(lambda *args: above.append(args[-1]))
    run(step, collate(samples(processor), 0)).backward()
    assert len(list(_tensors(below))) >= 3
    assert not any(tensor.requires_grad for tensor in _tensors(below))
    assert all(tensor.requires_grad for tensor in _tensors(above))
    assert all(".layers.1." in name for name in learned(step))
    assert not model.encoder.training


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def test_heads_and_layers_that_are_not_called_get_no_adapters() -> None:
    config = GPTNeoXConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=False,
    )
    names = lora.linear_names(GPTNeoXForCausalLM(config))
    assert names == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    pool = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1), "fc": nn.Linear(4, 4)})
    assert lora.linear_layers(pool) == ["fc"]


def test_what_cannot_be_adapted_is_refused(home: Path) -> None:
    model, _ = plain(home)
    with pytest.raises(ValueError, match=r"train\.connector\.first: there is no linear layer ins"):
        lora.adapt(model, {"connector.first": adapted("lora")}, 0)
    section = TrainSection(lr=1.0, dora=LoraSection(rank=2, targets=("sceond",)))
    with pytest.raises(ValueError, match=r"'sceond' is no linear layer of the connector; did you"):
        lora.adapt(model, {"connector": section}, 0)
    whole = nn.Module()
    whole.language_model = GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    )
    with pytest.raises(ValueError, match=r"c_attn is a Conv1D, which bitsandbytes cannot hold"):
        lora.adapt(whole, {"language_model": adapted("qlora")}, 0)
