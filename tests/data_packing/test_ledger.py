from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from data_packing.ledger import Counts, Ledger, Refusal, too_many


def example() -> Ledger:
    ledger = Ledger()
    ledger.read("a", 10)
    ledger.use("a", 8)
    ledger.refuse(Refusal("a", "k1", "broken\nimage:\u2028 ключ"))
    ledger.cut(Refusal("a", "k2", "2 slices"), pieces_refused=1)
    ledger.of("a").unreached += 1
    return ledger


def test_it_counts_and_names() -> None:
    counts = example().counts["a"]
    assert counts == Counts(10, 8, 1, 1, 1, 1)
    assert counts.read == counts.used + counts.refused + counts.unreached


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    example().write(tmp_path / "ledger.jsonl")
    assert Ledger.load(tmp_path / "ledger.jsonl") == example()
    assert (tmp_path / "ledger.jsonl").read_bytes().count(b"\n") == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_merging_adds() -> None:
    ledger = example()
    ledger.merge(example())
    ledger.read("b")
    assert ledger.counts["a"] == Counts(20, 16, 2, 2, 2, 2)
    assert len(ledger.refused) == 2


def test_documents_that_fail_later_move_from_used_to_refused_once() -> None:
    ledger = example()
    late = Refusal("a", "k3", "truncated PNG")
    ledger.drop([late, late])
    counts = ledger.counts["a"]
    assert (counts.used, counts.refused) == (7, 2)
    assert ledger.refused[-1] == late


def test_a_split_document_that_loses_a_slice_stays_used() -> None:
    ledger = example()
    ledger.drop([Refusal("a", "k2", "truncated PNG")])
    counts = ledger.counts["a"]
    assert (counts.used, counts.refused, counts.pieces_refused) == (8, 1, 2)
    assert ledger.split[-1].reason == "a slice is lost: truncated PNG"


def test_a_split_document_that_loses_every_slice_is_refused() -> None:
    ledger = Ledger()
    ledger.read("a", 1)
    ledger.use("a")
    ledger.cut(Refusal("a", "k", "2 slices"), slices=2)
    again = [Refusal("a", "k", "truncated", 0)] * 2  # the same slice in two epochs
    one = Ledger()
    one.merge(ledger)
    one.drop(again)
    assert one.counts["a"] == Counts(read=1, used=1, split=1, pieces_refused=1)
    ledger.drop([*again, Refusal("a", "k", "no image", 3)])
    assert ledger.counts["a"] == Counts(read=1, refused=1)
    assert ledger.refused == [Refusal("a", "k", "truncated; no image")]
    assert ledger.split == []


def test_the_table_shows_the_counts() -> None:
    console = Console(width=80, record=True, quiet=False)
    with console.capture() as capture:
        console.print(example().table())
    row = next(line for line in capture.get().splitlines() if "│ a" in line)
    assert [word for word in row.split() if word.isdigit()] == ["10", "8", "1", "1", "1"]


def test_more_than_may_be_lost_stops_with_a_table_of_reasons() -> None:
    broken = [Refusal("photos", f"{n}.png", f"broken PNG: byte {n}") for n in range(30)]
    missing = [Refusal("photos", f"{n}.jpg", "no caption") for n in range(5)]
    too_many(broken + missing, 350, 0.1, "documents")
    with pytest.raises(ValueError) as refusal:
        too_many(missing + broken, 349, 0.1, "documents")
    lines = str(refusal.value).splitlines()
    assert lines[0].startswith("35 of 349 documents cannot be used")
    assert "data.max_refused (10.0%)" in lines[0]
    assert lines[1].split() == ["30", "broken", "PNG:", "byte", "0", "(photos,", "0.png)"]
    assert lines[2].split()[:3] == ["5", "no", "caption"]
    assert "mllm data lint" in lines[-1]


def test_none_may_be_lost_and_none_is() -> None:
    too_many([], 0, 0.0, "documents")
    with pytest.raises(ValueError, match="1 of 5"):
        too_many([Refusal("s", "k", "why")], 5, 0.0, "documents")
