from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import reading
from data_packing.images import decode


def test_it_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "RATE", 2000.0)
    monkeypatch.setattr(reading, "CASES_SECONDS", 0.1)
    page = tmp_path / "results" / "reading.md"
    reading.main(["--images", "96", "--rounds", "1", "--workers", "1", "--output", str(page)])
    printed, written = capsys.readouterr().out, page.read_text()
    assert "Waiting" in printed
    assert "`python -m benchmarks.reading --images 96 --rounds 1 --workers 1`" in written
    for name in reading.CONTESTANTS:
        (line,) = [line for line in written.splitlines() if line.startswith(f"| {name} |")]
        assert all(float(cell.replace(",", "")) > 0 for cell in line.split("|")[2:6])
    assert "| 1 | 50 ms | " in written


def test_pictures_are_as_large_as_the_page_says_and_always_the_same() -> None:
    one, again = (list(reading.draw(12, 3)) for _ in range(2))
    assert one == again
    sizes = [len(document.images[0].data) for document in one]
    assert 36_000 < np.mean(sizes) < 46_000
    assert decode(one[0].images[0].data).shape == (384, 384, 3)


def test_a_pack_is_a_batch(tmp_path: Path) -> None:
    index, pattern = reading.write(list(reading.draw(64, 0)), tmp_path)
    assert [len(packs[0].sizes) for _, packs in reading.loader_of(index, 0)] == [32, 32]
    assert list(reading.theirs(pattern)) == [32, 32]


def test_a_ratio_compares_the_same_round() -> None:
    def rounds(*rates: float) -> list[reading.Speed]:
        return [reading.Speed(100, 100 / rate, 1.0) for rate in rates]

    speeds = {"bytes: ours": rounds(10, 40, 90), "bytes: other": rounds(5, 10, 30)}
    results = reading.Results(100, 1.0, speeds, [])
    assert results.ratio("bytes: other", lambda one: one.images / one.seconds) == pytest.approx(3)
