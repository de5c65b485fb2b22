from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.padded import collate
from benchmarks.training import Speed, rows, watch
from data_packing.sample import Sample

CONTESTANT = """
import json, sys, time
for step in range(1, 9):
    time.sleep(0.15)
    line = {"step": step, "tokens": 10 * step, "packs": 2}
    open(sys.argv[1], "a").write(json.dumps(line) + "\\n")
time.sleep(60)
"""


def test_only_the_steps_after_the_warm_ones_are_measured(tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    command = [sys.executable, "-c", CONTESTANT, str(metrics)]
    before = psutil.Process().children()  # such as the fork server of another test's loader
    speed = watch("slow: one", command, metrics, warm=2, steps=4, capacity=40)
    assert speed.tokens == 10 * (3 + 4 + 5 + 6)
    assert speed.places == 4 * 2 * 40
    assert 0.4 < speed.seconds < 2.0
    assert psutil.Process().children() == before


def test_a_contestant_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such data')"]
    with pytest.raises(RuntimeError, match="no such data"):
        watch("bad", command, tmp_path / "run" / "metrics.jsonl", 1, 1, 1)


def test_ratios_are_to_the_first() -> None:
    cells = rows([Speed("a", 2, 100, 100, 1.0, 2.0), Speed("b", 2, 100, 200, 4.0, 4.0)])
    assert cells[1] == ["b", "50", "50%", "25", "25", "4.00", "2.00"]


def test_padded_batches_hold_every_document_and_learn_no_padding() -> None:
    samples = [
        Sample(np.arange(1, 1 + n), np.where(np.arange(n) % 2, np.arange(1, 1 + n), -100))
        for n in (3, 5)
    ]
    batch = collate(samples)
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert batch["input_ids"][0].tolist() == [1, 2, 3, 0, 0]
    assert batch["labels"][0].tolist() == [-100, 2, -100, -100, -100]
    assert "pixels" not in batch
