"""One tiny home of models and data, and one launch per number of ranks, for all tests here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm.training import comm_op
from mllm.training.launch import end_session, launcher
from mllm.training.processes import free_port
from mllm.training.run_folder import RunFolder, read_lines
from tests.training import second, tiny

ROOT = Path(__file__).resolve().parents[2]
LORA: dict[str, Any] = {
    "train__language_model": {"lr": 1e-2, "lora": {"rank": 4, "dropout": 0.1}},
    "model__connector": {"name": "mlp", "init": "ridge"},
    "data__workers": 1,
}
CROSS: dict[str, Any] = {
    "model__fusion": {"name": "cross_attention", "every": 1},
    "model__images": {"tiling": "dynamic", "min_tiles": 4, "tiles": 4},
    "train__fusion": {"lr": 3e-2},
    "train__language_model": {"lr": 1e-2, "lora": {"rank": 4}},
    "data__packing": {"tokens": 64, "documents": 1, "balance": False},
    "run__epochs": 2,
}
BOTH = ("language_modeling", second.NAME)
CURVE: dict[str, Any] = {"run__epochs": None, "run__tokens": 20 * 256}
"""Twenty steps."""
PARTS: dict[str, Any] = {
    **CURVE,
    "train": {
        "encoder": "frozen",
        "encoder.vision.encoder.layers.0": {"lr": 1e-3},
        "connector": {"lr": 1e-2},
        "language_model": {"lr": 5e-3, "lora": {"rank": 4, "dropout": 0.1}},
    },
}
"""A frozen part, adapters, three learning rates."""
LONG: dict[str, Any] = {"run__epochs": 12, "run__checkpoint_every": 4, "run__zero": 3}


def windows(home: Path) -> dict[str, Any]:
    """Eight shards in two windows, and a small source in each; ten steps begin a second epoch."""
    names = ("small", "texts")
    return {
        "data__sources": [{"path": str(home / "data" / f"{name}-*.tar")} for name in names],
        "data__window": 24,
        "data__workers": 1,
        "run__epochs": None,
        "run__tokens": 2560,
    }


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models and drawn data."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    comm_op.ensure(print)
    return tiny.make_all(tmp_path_factory.mktemp("tiny"))


@dataclass
class Runs:
    """Stages that ran, by the name of their folder."""

    path: Path

    def folder(self, name: str) -> RunFolder:
        """A run's folder."""
        return RunFolder(self.path / name)

    def losses(self, name: str) -> list[float]:
        """The loss of every step; there is exactly one line per step."""
        records = read_lines(self.folder(name).metrics)
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return [record["loss"] for record in records]

    def gradient_norms(self, name: str) -> list[float]:
        """The gradient's norm of every step, before clipping."""
        return [record["grad_norm"] for record in read_lines(self.folder(name).metrics)]

    def groups(self, name: str) -> list[dict[str, Any]]:
        """What the optimizer's groups were when the run's last part ended."""
        groups: list[dict[str, Any]] = json.loads((self.path / f"{name}.groups").read_text())
        return groups

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """What the stage saved for others."""
        return load_file(self.path / name / "model.safetensors")

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Masters and moments of the newest checkpoint."""
        newest = max((self.path / name / "state").glob("step-*"))
        tensors: dict[str, torch.Tensor] = {}
        for file in newest.glob("*.safetensors"):
            tensors |= load_file(file)
        return tensors


def run_many(ranks: int, recipes: list[str]) -> None:
    """Launch deepspeed once for a list of recipes (`file`, `file@steps` or `file@full`)."""
    command = [*launcher(), "--num_gpus", str(ranks), "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), str(ROOT / "tests/training/run_many.py")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *recipes],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=800)
    finally:
        end_session(process)
    assert process.returncode == 0, output.decode(errors="replace")[-6000:]


def same_bits(runs: Runs, whole: str, again: str) -> None:
    """A run that was stopped and went on is the one that was not."""
    assert runs.losses(again) == runs.losses(whole)
    for read in (runs.weights, runs.state):
        expected, got = read(whole), read(again)
        assert expected.keys() == got.keys()
        different = [name for name in expected if not torch.equal(expected[name], got[name])]
        assert different == []


Writer = Callable[..., str]


def writer(home: Path, runs: Runs) -> Writer:
    """Writes recipes whose output is in `runs`, under their name."""

    def write(name: str, file: str = "", **changes: Any) -> str:
        values = tiny.recipe(home, runs.path / name, **changes)
        return str(tiny.write_recipe(runs.path / f"{file or name}.yaml", values))

    return write


def crossed(home: Path) -> dict[str, Any]:
    """Gated cross-attention; some documents have no image."""
    paths = [str(home / "data" / f"{name}-*.tar") for name in ("captions", "texts")]
    return {**CROSS, "data__sources": [{"path": path} for path in paths]}


def weighted(home: Path) -> dict[str, Any]:
    """Two objectives, documents weighed; seed 9 puts the broken one into the first step."""
    return {
        "objectives": list(BOTH),
        "data__sources": sources(home, captions=BOTH, texts=BOTH[:1], broken=BOTH[1:]),
        "data__loss_weights": "sqrt",
        "run__seed": 9,
    }


def experts(home: Path, name: str) -> dict[str, Any]:
    """Six steps of a language model with experts; a pack is one caption or one text."""
    return {
        "model__language_model": {"path": str(home / name)},
        "data__sources": sources(home, captions=BOTH[:1], texts=BOTH[:1]),
        "data__packing": {"tokens": 64, "documents": 1},
        "run__epochs": None,
        "run__tokens": 6 * 256,
    }


def sources(home: Path, **objectives: tuple[str, ...]) -> list[dict[str, Any]]:
    """The sources of a recipe, each with its objectives."""
    return [
        {"path": str(home / "data" / f"{name}-*.tar"), "objectives": list(names)}
        for name, names in objectives.items()
    ]


def spoiled(home: Path) -> dict[str, Any]:
    """Twelve steps, of which five change nothing; three of these follow one another."""
    return {
        "objectives": [second.TRAPS],
        "data__sources": [{"path": str(home / "data" / "traps-*.tar")}],
        "data__packing": {"tokens": 64, "documents": 1},
        "run__epochs": 2,
        "run__checkpoint_every": 1,
        "run__keep": 100,
    }


@pytest.fixture(scope="session")
def skipping(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two ranks whose steps are not all finite; `-again` stops at its limit and goes on."""
    runs = Runs(tmp_path_factory.mktemp("skipping"))
    write, changes = writer(home, runs), spoiled(home)
    recipes = []
    for precision, zero in (("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)):
        name, how = f"{precision}-{zero}", {"run__zero": zero, "run__precision": precision}
        recipes.append(write(name, **changes, **how))
        if (precision, zero) in SKIPPING_AGAIN:
            stopping = write(f"{name}-again", f"{name}-stops", **changes, **how, run__max_skipped=2)
            recipes += [stopping, write(f"{name}-again", **changes, **how)]
    full = write("full", run__checkpoint_every=1)
    recipes += [write("fits"), f"{full}@2", f"{full}@full", full]
    run_many(2, recipes)
    return runs


SKIPPING_AGAIN = (("fp32", 0), ("fp32", 3), ("bf16", 1))


@pytest.fixture(scope="session")
def two(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Everything that runs on two ranks."""
    runs = Runs(tmp_path_factory.mktemp("two"))
    write = writer(home, runs)
    recipes = []
    for precision, stages in (("fp32", (0, 1, 2, 3)), ("bf16", (1, 2, 3))):
        for zero in stages:
            changes = {"run__zero": zero, "run__precision": precision}
            recipes.append(write(f"{precision}-{zero}", **changes))
            again = write(f"{precision}-{zero}-again", **changes)
            recipes += [f"{again}@2", again]
    lora = {"run__zero": 3, **LORA}
    again = write("lora-again", **lora)
    recipes += [write("lora", **lora), f"{again}@2", again]
    recipes += [write("windows", **windows(home))]
    again = write("windows-again", **windows(home))
    recipes += [f"{again}@6", again]
    after = {"model": {"from": str(runs.path / "lora")}, "train__language_model": "frozen"}
    recipes.append(write("after-lora", run__zero=3, **after))
    recipes.append(
        write(
            "text",
            run__zero=3,
            data__sources=[
                {"path": str(home / "data" / f"{name}-*.tar")} for name in ("captions", "texts")
            ],
            data__packing={"tokens": 64, "documents": 1},
        )
    )
    recipes.append(write("crossed", run__zero=3, **crossed(home)))
    recipes.append(
        write(
            "broken",
            data__sources=[{"path": str(home / "data" / "broken-*.tar")}],
            run__zero=3,
        )
    )
    recipes.append(write("weighted", run__zero=3, **weighted(home)))
    recipes.append(
        write(
            "turns",
            objectives=list(BOTH),
            data__sources=sources(home, texts=BOTH[:1], broken=BOTH[1:]),
            data__packing={"tokens": 64, "documents": 1},
            run__tokens_per_step=64,
        )
    )
    recipes += [write(name, run__zero=3, **experts(home, name)) for name in tiny.EXPERTS]
    recipes += [write(f"curve-{zero}", run__zero=zero, **CURVE) for zero in (1, 2, 3)]
    recipes.append(write("parts", run__zero=2, **PARTS))
    recipes.append(write("hop", run__zero=2, **PARTS) + "@9")
    recipes.append(write("long", **LONG))
    recipes.append(write("changed", run__seed=5) + "@2")
    recipes.append(write("changed", "changed-later", run__seed=6))
    run_many(2, recipes)
    return runs


@pytest.fixture(scope="session")
def one(home: Path, two: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What runs on one rank; `hop` goes on with what two ranks began."""
    runs = Runs(tmp_path_factory.mktemp("one"))
    write = writer(home, runs)
    shutil.copytree(two.path / "hop", runs.path / "hop")
    run_many(
        1,
        [
            write("fp32-0", run__zero=0),
            write("curve-0", run__zero=0, **CURVE),
            write("curve-3", run__zero=3, **CURVE),
            write("bf16-1", run__zero=1, run__precision="bf16"),
            write("lora", run__zero=0, **LORA),
            write("weighted", run__zero=0, **weighted(home)),
            write("crossed", run__zero=0, **crossed(home)),
            *(write(name, run__zero=0, **experts(home, name)) for name in tiny.EXPERTS),
            write("hop", run__zero=3, **PARTS),
            write("windows", **windows(home)),
        ],
    )
    return runs


@pytest.fixture(scope="session")
def four(home: Path, two: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What runs on four ranks; `hop` goes on with what two ranks began."""
    runs = Runs(tmp_path_factory.mktemp("four"))
    write = writer(home, runs)
    shutil.copytree(two.path / "hop", runs.path / "hop")
    recipes = [write(f"curve-{zero}", run__zero=zero, **CURVE) for zero in (1, 2, 3)]
    recipes.append(write("hop", run__zero=1, **PARTS))
    run_many(4, [*recipes, write("weighted", run__zero=2, **weighted(home))])
    return runs
