from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from benchmarks import packing


def test_it_measures_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "results" / "packing.md"
    options = ["--documents", "300", "--capacities", "4096", "--at-once", "2000"]
    options += ["--output", str(page)]
    packing.main(options)
    printed, written = capsys.readouterr().out, page.read_text()
    for name in packing.DISTRIBUTIONS:
        assert name in printed
        assert f"| {name} | 300 | 4096 | ours | 0." in written
    command = "python -m benchmarks.packing --documents 300 --capacities 4096 --at-once 2000"
    assert f"`{command}`" in written
    assert "## 2,000 documents at once" in written
    assert "Python 3." in written


def test_a_packer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    rows = packing.measure([50], [4096], seed=0)
    absent = [row.cells()[3:5] for row in rows if row.efficiency is None]
    assert absent[:2] == [["TRL bfd 1k", "not installed"], ["TRL bfd all", "not installed"]]
    assert len(absent) == 6


def test_next_fit_and_ours_count_packs() -> None:
    lengths = np.array([6, 9, 4, 1])
    assert packing.next_fit(lengths, 10) == 3
    assert packing.ours(lengths, 10) == 2


def test_trl_counts_the_packs_of_its_own_code() -> None:
    pytest.importorskip("trl")
    lengths = np.array([6, 9, 4, 1])
    assert packing.trl_whole(lengths, 10) == 2
    assert packing.trl_shipped(lengths, 10) == 2


def test_lengths_have_the_means_that_the_page_names() -> None:
    random = np.random.default_rng(0)
    means = {name: draw(random, 50_000).mean() for name, draw in packing.DISTRIBUTIONS.items()}
    assert means["caption"] == pytest.approx((144 + 256 + 729) / 3 + 40, rel=0.02)
    assert means["interleaved"] == pytest.approx(4.5 * 144 + 600, rel=0.02)
    assert means["instruct"] == pytest.approx(0.75 * 10.5 * 144 + 250, rel=0.02)
