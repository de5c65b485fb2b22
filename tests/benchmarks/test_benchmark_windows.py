from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import windows


def test_it_plans_the_same_documents_in_windows_and_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "SHARD", 25_000)  # forty files instead of a hundred
    assert windows.write_corpus(tmp_path, 1) > 20_000_000
    cut, whole = (windows.plan_all(tmp_path, 1, window) for window in (300_000, 1_000_000))
    assert (cut.windows, whole.windows) == (4, 1)
    assert cut.packs == pytest.approx(whole.packs, rel=1e-3)
    assert cut.efficiency > 0.999
    page = windows.as_markdown([(cut, 90_000_000), (whole, 90_000_000)], "the command")
    assert "90 bytes a document" in page
    assert page.count("| 1 M | ") == 2
