"""Every kind of adapter on every part, on real DeepSpeed ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm.models.assemble import load
from tests.training.conftest import Runs, run_many, same_bits, writer

CLOSE = 2e-5
PARTS = ("encoder", "connector", "language_model")


def everywhere(kind: str, **changes: Any) -> dict[str, Any]:
    """A recipe's changes: adapters of one kind on every part."""
    how = {"lr": 1e-2, kind: {"rank": 3}}
    return {f"train__{part}": how for part in PARTS} | changes


@pytest.fixture(scope="module")
def pair(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """On two ranks, under every stage."""
    runs = Runs(tmp_path_factory.mktemp("adapters-pair"))
    write = writer(home, runs)
    files = [write(f"qlora-{zero}", **everywhere("qlora", run__zero=zero)) for zero in range(4)]
    again = write("qlora-again", **everywhere("qlora", run__zero=3))
    files += [f"{again}@2", again, write("dora-3", **everywhere("dora", run__zero=3))]
    files.append(write("qlora-bf16", **everywhere("qlora", run__zero=1, run__precision="bf16")))
    run_many(2, files)
    return runs


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """On one rank."""
    runs = Runs(tmp_path_factory.mktemp("adapters-alone"))
    write = writer(home, runs)
    run_many(1, [write(kind, **everywhere(kind, run__zero=0)) for kind in ("qlora", "dora")])
    return runs


@pytest.mark.parametrize("kind", ["qlora", "dora"])
def test_adapters_learn_alike_under_every_stage(pair: Runs, alone: Runs, kind: str) -> None:
    reference, norms = alone.losses(kind), alone.gradient_norms(kind)
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


def test_a_resumed_run_is_bit_identical(pair: Runs) -> None:
    same_bits(pair, "qlora-3", "qlora-again")
