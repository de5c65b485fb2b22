from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import balance, packing


def test_it_measures_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "results" / "balance.md"
    balance.main(["--documents", "3000", "--ranks", "4", "--output", str(page)])
    printed, written = capsys.readouterr().out, page.read_text()
    assert "max/mean" in printed
    assert "`python -m benchmarks.balance --documents 3000 --ranks 4`" in written
    for name, capacity in balance.CASES:
        ratio = {}
        for dealing in ("ours", "random", "BFD, random"):
            start = f"| {name} | {capacity} | 1.5B | 4 | {dealing} | "
            (line,) = [line for line in written.splitlines() if line.startswith(start)]
            ratio[dealing] = float(line.removeprefix(start).split(" ")[0])
        assert 1.0 <= ratio["ours"] < ratio["random"]
        assert ratio["ours"] < ratio["BFD, random"]


def test_documents_have_the_lengths_of_the_packing_benchmark_and_their_images() -> None:
    for name, draw in packing.DISTRIBUTIONS.items():
        rows = balance.documents(name, 2000, 4096, 7)
        lengths = np.minimum(draw(np.random.default_rng(7), 2000), 4096)
        assert rows.tokens.tolist() == lengths.tolist()
        assert (rows.patches == rows.images * 729).all()
        assert (rows.tokens[rows.tokens < 4096] > 144 * rows.images[rows.tokens < 4096]).all()
        assert rows.images.max() > 0


def test_too_few_documents_for_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="too few documents for one step of 512"):
        list(balance.measure(100, [512], 0))
