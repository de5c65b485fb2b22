"""Every kind of adapter and every optimizer on real DeepSpeed ranks, one launch per number."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm.models.assemble import load
from tests.training.conftest import Runs, run_many, writer

CLOSE = 2e-5
PARTS = ("encoder", "connector", "language_model")
PLAIN = {"encoder": {"lr": 1e-3, "layer_decay": 0.5}, "connector": {"lr": 3e-3, "warmup": 0.4}}
RESUMED = ("qlora-3", "dora-3", "muon-bf16", "eight-2")
HOPS = ("muon-bf16", "eight-2")


def train(values: dict[str, Any]) -> dict[str, Any]:
    """The changes that make it the `train:` section."""
    return {f"train__{part}": how for part, how in values.items()}


def everywhere(kind: str) -> dict[str, Any]:
    """Adapters of one kind on every part."""
    return train({part: {"lr": 1e-2, kind: {"rank": 3}} for part in PARTS})


def recipes() -> dict[str, dict[str, Any]]:
    """Name of a run → its changes."""
    found = {f"qlora-{z}": {**everywhere("qlora"), "run__zero": z} for z in range(4)}
    found["qlora-bf16"] = {**everywhere("qlora"), "run__zero": 2, "run__precision": "bf16"}
    found["dora-3"] = {**everywhere("dora"), "run__zero": 3}
    for name, word in (("muon", "muon"), ("eight", "adamw_8bit")):
        values = {**train(PLAIN), "optimizer__name": word, "optimizer__schedule": "wsd"}
        found[f"{name}-bf16"] = {**values, "run__zero": 1, "run__precision": "bf16"}
        fp32 = 0 if name == "muon" else 2
        found[f"{name}-{fp32}"] = {**values, "run__zero": fp32}
    return found


@pytest.fixture(scope="module")
def pair(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every recipe on two ranks."""
    runs = Runs(tmp_path_factory.mktemp("pair"))
    write = writer(home, runs)
    files = []
    for name, changes in recipes().items():
        files.append(write(name, **changes))
        if name in RESUMED:
            again = write(f"{name}-again", **changes)
            files += [f"{again}@2", again]
    files += [write(f"{name}-hop", **recipes()[name]) + "@2" for name in HOPS]
    run_many(2, files)
    return runs


@pytest.fixture(scope="module")
def alone(home: Path, pair: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """On one rank: from the beginning, and on from what two ranks began."""
    runs = Runs(tmp_path_factory.mktemp("alone"))
    write = writer(home, runs)
    whole = {"run__zero": 0}
    files = [write(f"{name}-0", **recipes()[f"{name}-3"] | whole) for name in ("qlora", "dora")]
    files.append(write("muon-0", **recipes()["muon-0"]))
    files.append(write("eight-0", **recipes()["eight-2"] | whole))
    for name in HOPS:
        shutil.copytree(pair.path / f"{name}-hop", runs.path / f"{name}-hop")
        files.append(write(f"{name}-hop", **recipes()[name] | {"run__zero": 1}))
    run_many(1, files)
    return runs


@pytest.mark.parametrize("kind", ["qlora", "dora"])
def test_adapters_learn_alike_under_every_stage(pair: Runs, alone: Runs, kind: str) -> None:
    reference, norms = alone.losses(f"{kind}-0"), alone.gradient_norms(f"{kind}-0")
    assert len(reference) == 5
    assert min(reference[-2:]) < reference[0] - 0.02
    for zero in range(4) if kind == "qlora" else (3,):
        assert pair.losses(f"{kind}-{zero}") == pytest.approx(reference, abs=CLOSE), zero
        assert pair.gradient_norms(f"{kind}-{zero}") == pytest.approx(norms, rel=1e-3)
    if kind == "qlora":
        assert pair.losses("qlora-bf16") == pytest.approx(reference, abs=0.1)


@pytest.mark.parametrize("name", [*(f"qlora-{zero}" for zero in range(4)), "qlora-bf16", "dora-3"])
def test_every_adapter_moves_and_nothing_else_has_state(pair: Runs, name: str) -> None:
    state = pair.state(name)
    masters = {n.removesuffix("/master"): t for n, t in state.items() if n.endswith("/master")}
    assert all(".lora_" in n for n in masters)
    assert {n.split(".")[1] for n in masters} == set(PARTS)
    still = [n for n, t in masters.items() if ".lora_B." in n and not t.any()]
    assert still == []
    unmoved = [n for n in masters if not state[f"{n}/exp_avg"].any()]
    assert unmoved == [], "adapters that never got a gradient"


def test_a_stage_with_4_bits_saves_what_it_computed_with(home: Path, pair: Runs) -> None:
    """The dequantised weights with the adapters added, which any program loads."""
    name = "qlora-3"
    saved, state = pair.weights(name), pair.state(name)
    assert not [n for n in saved if "lora" in n or "absmax" in n or "quant" in n]
    assert {t.dtype for t in saved.values()} == {torch.float32}
    key = "model.layers.1.self_attn.q_proj"
    a, b = (state[f"model.language_model.{key}.lora_{x}.default.weight/master"] for x in "AB")
    base = saved[f"language_model.{key}.weight"] - 2.0 * (b @ a)
    original = load_file(home / "llm" / "model.safetensors")[f"{key}.weight"]
    error = (base - original).abs().max() / original.abs().max()
    assert 1e-3 < error < 0.2, "NF4 is near the weights, and is not them"
    norm = "language_model.model.norm.weight"
    assert torch.equal(
        saved[norm], load_file(home / "llm" / "model.safetensors")["model.norm.weight"]
    )
    folders = sorted(path.name for path in (pair.path / name).glob("lora*"))
    assert folders == ["lora", "lora_connector", "lora_encoder"]
    encoder = load_file(pair.path / name / "lora_encoder" / "adapter_model.safetensors")
    assert all(n.startswith("base_model.model.vision.") for n in encoder)
    model, _ = load(pair.path / name)
    assert not [p for p in model.parameters() if p.dtype == torch.uint8]
    assert {t.dtype for t in pair.weights("qlora-bf16").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bit_identical(pair: Runs, name: str) -> None:
    assert pair.losses(f"{name}-again") == pair.losses(name)
    for read in (pair.weights, pair.state):
        expected, got = read(name), read(f"{name}-again")
        assert expected.keys() == got.keys()
        assert [n for n in expected if not torch.equal(expected[n], got[n])] == []


def test_muon_is_the_same_on_any_number_of_ranks(pair: Runs, alone: Runs) -> None:
    reference = alone.losses("muon-0")
    assert reference[-1] < reference[0] - 0.1
    assert pair.losses("muon-0") == pytest.approx(reference, abs=1e-3)
    assert pair.losses("muon-bf16") == pytest.approx(reference, abs=0.02)
    norms = pair.gradient_norms("muon-bf16")
    assert norms == pytest.approx(alone.gradient_norms("muon-0"), rel=0.05)
    kept = {n.split("/")[1] for n in pair.state("muon-bf16") if "up_proj" in n}
    assert kept == {"master", "momentum_buffer"}


def test_moments_in_8_bits_are_near_those_in_32(pair: Runs, alone: Runs) -> None:
    reference = alone.losses("eight-0")
    assert reference[-1] < reference[0] - 0.1
    assert pair.losses("eight-2") == pytest.approx(reference, abs=5e-3)
    assert pair.losses("eight-bf16") == pytest.approx(reference, abs=0.1)
    state = pair.state("eight-2")
    assert state["model.connector.first.weight/state1"].dtype == torch.uint8
    assert state["model.connector.first.bias/state1"].dtype == torch.float32


def test_other_ranks_go_on(pair: Runs, alone: Runs) -> None:
    for name, near in (("muon-bf16", 1e-2), ("eight-2", 5e-3)):
        assert len(pair.losses(f"{name}-hop")) == 2
        assert alone.losses(f"{name}-hop") == pytest.approx(pair.losses(name), abs=near), name
