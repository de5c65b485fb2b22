from __future__ import annotations

from data_packing.wording import counted


def test_one_is_no_plural() -> None:
    assert [counted(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    assert counted(1_000, "more reason") == "1,000 more reasons"
    assert [counted(number, "image or clip") for number in (1, 2)] == [
        "1 image or clip",
        "2 images or clips",
    ]
