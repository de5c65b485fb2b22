"""Every optimizer on real DeepSpeed ranks: its losses, its checkpoints, and other ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import Runs, run_many, same_bits, writer

RESUMED = ("muon-bf16", "eight-2")


def recipes() -> dict[str, dict[str, Any]]:
    """Name of a run → its changes."""
    bf16 = {"run__zero": 1, "run__precision": "bf16"}
    shared = {
        "train__encoder": {"lr": 1e-3, "layer_decay": 0.5},
        "train__connector": {"lr": 3e-3, "warmup": 0.4},
        "optimizer__schedule": "wsd",
    }
    muon, eight = ({**shared, "optimizer__name": name} for name in ("muon", "adamw_8bit"))
    return {
        "muon-0": {**muon, "run__zero": 0},
        "muon-bf16": muon | bf16,
        "eight-2": {**eight, "run__zero": 2},
        "eight-bf16": eight | bf16,
    }


@pytest.fixture(scope="module")
def pair(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """On two ranks."""
    runs = Runs(tmp_path_factory.mktemp("optimizers-pair"))
    write = writer(home, runs)
    files = [write(name, **changes) for name, changes in recipes().items()]
    for name in RESUMED:
        again = write(f"{name}-again", **recipes()[name])
        files += [f"{again}@2", again, write(f"{name}-hop", **recipes()[name]) + "@2"]
    run_many(2, files)
    return runs


@pytest.fixture(scope="module")
def alone(home: Path, pair: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """On one rank: from the beginning, and on from what two ranks began."""
    runs = Runs(tmp_path_factory.mktemp("optimizers-alone"))
    write = writer(home, runs)
    files = [write("muon-0", **recipes()["muon-0"])]
    files.append(write("eight-0", **recipes()["eight-2"] | {"run__zero": 0}))
    for name in RESUMED:
        shutil.copytree(pair.path / f"{name}-hop", runs.path / f"{name}-hop")
        files.append(write(f"{name}-hop", **recipes()[name] | {"run__zero": 1}))
    run_many(1, files)
    return runs


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bit_identical(pair: Runs, name: str) -> None:
    same_bits(pair, name, f"{name}-again")


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
