"""Steps whose loss or gradient is not finite, and checkpoints that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from mllm.training.checkpoint_index import homes, newest, read_state
from mllm.training.progress import Screen
from mllm.training.run_folder import read_lines
from tests.training.conftest import SKIPPING_AGAIN, Runs

SKIPPED = [5, 8, 9, 10, 12]
KINDS = [("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)]


def tensors(home: Path) -> dict[str, Tensor]:
    """Masters and moments of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in home.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("precision", "zero"), KINDS)
def test_a_step_that_is_not_finite_changes_nothing(
    skipping: Runs, precision: str, zero: int
) -> None:
    folder = skipping.folder(f"{precision}-{zero}")
    records = read_lines(folder.metrics)
    assert [record["step"] for record in records if "skipped" in record] == SKIPPED
    saved = {read_state(home).step: home for home in homes(folder.state)}
    assert sorted(saved) == list(range(1, 13))
    for step in range(2, 13):
        unchanged = same(tensors(saved[step]), tensors(saved[step - 1]))
        assert unchanged == (step in SKIPPED), step
    state = read_state(saved[10])
    assert (state.skipped, state.in_a_row) == (4, 3)
    assert read_state(saved[11]).in_a_row == 0
    assert state.loss == records[6]["loss"]


@pytest.mark.parametrize(("precision", "zero"), KINDS)
def test_every_zero_stage_skips_alike(skipping: Runs, precision: str, zero: int) -> None:
    expected = read_lines(skipping.folder("fp32-0").metrics)
    got = read_lines(skipping.folder(f"{precision}-{zero}").metrics)
    for before, after in zip(expected, got, strict=True):
        assert before.get("skipped") == after.get("skipped")
        assert before.get("documents") == after.get("documents")
        if "skipped" not in before:
            close = 2e-5 if precision == "fp32" else 2e-2
            assert after["loss"] == pytest.approx(before["loss"], abs=close)


def test_the_documents_of_a_skipped_step_are_named(skipping: Runs) -> None:
    records = {record["step"]: record for record in read_lines(skipping.folder("fp32-3").metrics)}
    assert records[5]["skipped"] == "the loss is inf"
    assert records[5]["documents"] == ["traps-0018"]  # of its pack alone
    assert records[8]["skipped"] == "the gradient is not finite"
    assert "traps-0013" in records[8]["documents"]
    assert len(records[8]["documents"]) > 1  # nobody knows whose gradient it is
    assert (records[8]["loss"], records[8]["grad_norm"]) == (None, None)
    assert [record["total_skipped"] for record in records.values()][-3:] == [4, 4, 5]


@pytest.mark.parametrize(("precision", "zero"), SKIPPING_AGAIN)
def test_too_many_in_a_row_stop_the_run_and_it_goes_on_bit_identically(
    skipping: Runs, precision: str, zero: int
) -> None:
    name = f"{precision}-{zero}"
    told = {(skipping.path / f"{name}-again.error-{rank}").read_text() for rank in (0, 1)}
    (message,) = told
    assert "step 10 and the 2 steps before it were skipped (the loss is inf)" in message
    assert "run.max_skipped (2)" in message
    assert "Documents of the last: traps-0018;" in message
    assert "the last checkpoint is of step 9" in message

    def comparable(run: str) -> list[dict[str, object]]:
        timed = ("seconds", "wait", "total_seconds")
        records = read_lines(skipping.folder(run).metrics)
        return [{k: v for k, v in record.items() if k not in timed} for record in records]

    assert comparable(f"{name}-again") == comparable(name)
    assert same(skipping.state(f"{name}-again"), skipping.state(name))
    assert same(skipping.weights(f"{name}-again"), skipping.weights(name))


def test_a_skipped_step_is_said_on_screen() -> None:
    console = Console(record=True, width=120, force_terminal=False)
    screen = Screen("1_align", console)
    record = {"step": 7, "steps": 9, "seconds": 1.0, "tokens": 5, "loss": None}
    keys = [f"photo-{i}" for i in range(8)]
    screen.metric(record | {"skipped": "the loss is nan", "documents": keys})
    screen.metric(record | {"step": 8, "loss": 2.5})
    assert console.export_text().strip() == (
        "1_align: step 7 is skipped: the loss is nan "
        "(documents photo-0, photo-1, photo-2, photo-3, photo-4 and 3 more)"
    )
    assert screen.loss == 2.5


def test_a_full_disk_of_one_rank_is_told_by_all_and_keeps_the_checkpoint_before(
    skipping: Runs,
) -> None:
    told = {(skipping.path / f"full.error-{rank}").read_text() for rank in (0, 1)}
    (message,) = told  # of both ranks, though the second alone had no room
    assert message.startswith("NoSpace: no space left for")
    assert "01-0000.safetensors" in message
    assert "What was saved before is untouched" in message
    assert skipping.losses("full") == skipping.losses("fits")
    assert same(skipping.weights("full"), skipping.weights("fits"))
    state = skipping.folder("full").state
    assert [path.name for path in state.iterdir()] == ["step-00000005"]
    home, warnings = newest(state)
    assert home is not None
    assert warnings == []
    index = json.loads((home / "index.json").read_text())
    assert index["saved"] > 0
    assert index["loss"] == skipping.losses("full")[-1]
