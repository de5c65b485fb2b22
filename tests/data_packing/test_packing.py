from __future__ import annotations

import math
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_packing import pack_lengths

CAPACITY = 40
lengths = st.lists(st.integers(1, CAPACITY), max_size=120)


def check(packs: list[list[int]], sizes: list[int], capacity: int) -> None:
    assert sorted(at for pack in packs for at in pack) == list(range(len(sizes)))
    for pack in packs:
        assert pack == sorted(pack)
        assert sum(sizes[at] for at in pack) <= capacity


@given(lengths, st.integers(1, 70))
def test_every_document_is_in_one_pack_and_no_pack_is_too_full(
    sizes: list[int], window: int
) -> None:
    packs = pack_lengths(sizes, CAPACITY, window=window)
    check(packs, sizes, CAPACITY)
    assert packs == pack_lengths(np.array(sizes, dtype=np.int32), CAPACITY, window=window)


@given(
    st.lists(st.tuples(st.integers(1, CAPACITY), st.integers(0, 30)), max_size=120),
    st.integers(1, 9),
    st.integers(30, 90),
)
def test_both_capacities_and_the_document_limit_hold_together(
    sizes: list[tuple[int, int]], most: int, second_capacity: int
) -> None:
    tokens, patches = [a for a, _ in sizes], [b for _, b in sizes]
    packs = pack_lengths(
        tokens, CAPACITY, second=patches, second_capacity=second_capacity, max_documents=most
    )
    check(packs, tokens, CAPACITY)
    check(packs, patches, second_capacity)
    assert all(len(pack) <= most for pack in packs)


@given(lengths)
def test_small_documents_are_packed_alike(sizes: list[int]) -> None:
    check(pack_lengths(sizes, 1000), sizes, 1000)


@pytest.mark.parametrize(("capacity", "bar"), [(4096, 0.998), (8192, 0.999), (16384, 0.999)])
def test_efficiency_on_interleaved_lengths(capacity: int, bar: float) -> None:
    random = np.random.default_rng(0)
    text = np.exp(random.normal(np.log(435), 0.8, 50_000)).astype(int) + 1
    sizes = np.minimum(random.integers(1, 9, 50_000) * 144 + text, capacity)
    packs = pack_lengths(sizes, capacity)
    assert sizes.sum() / capacity / len(packs) > bar


def test_large_documents_are_packed_as_well_as_by_best_fit_decreasing() -> None:
    random = np.random.default_rng(0)
    large = random.integers(51, 100, 4000)
    sizes = np.concatenate([large, 100 - large])
    random.shuffle(sizes)
    assert len(pack_lengths(sizes, 100)) <= 4040


def test_documents_stay_near_their_place() -> None:
    sizes = np.random.default_rng(0).integers(10, 300, 20_000)
    order = np.concatenate([np.array(pack) for pack in pack_lengths(sizes, 4096)])
    assert np.abs(order - np.arange(len(order))).max() < 200


def test_the_second_resource_is_filled_well_where_it_binds() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 9, 20_000)
    patches = images * 196
    tokens = images * 49 + random.integers(5, 600, 20_000)
    packs = pack_lengths(tokens, 8192, second=patches, second_capacity=8000)
    assert patches.sum() / 8000 / len(packs) > 0.95


def test_wrong_input_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match="document 1 has length 9, more than the capacity 8"):
        pack_lengths([1, 9], 8)
    with pytest.raises(ValueError, match="document 0 has length 0"):
        pack_lengths([0, 1], 8)
    with pytest.raises(ValueError, match="document 1 has second length 5"):
        pack_lengths([1, 1], 8, second=[0, 5], second_capacity=4)
    with pytest.raises(ValueError, match="both or neither"):
        pack_lengths([1], 8, second=[1])
    with pytest.raises(ValueError, match="2 lengths but 1 second"):
        pack_lengths([1, 1], 8, second=[1], second_capacity=4)
    with pytest.raises(ValueError, match="max_documents is 0"):
        pack_lengths([1], 8, max_documents=0)
    with pytest.raises(ValueError, match="whole numbers"):
        pack_lengths([1.5], 8)  # type: ignore[list-item]
    assert pack_lengths([], 8) == []


@pytest.mark.parametrize("lengths", [[], [1, 2]])
@pytest.mark.parametrize("name", ["capacity", "second_capacity", "max_documents", "window"])
@pytest.mark.parametrize("bad", [-5, 0, 2.5, math.inf, math.nan, "3", None, True, [8]])
def test_limits_that_are_no_whole_numbers_are_refused(
    lengths: list[int], name: str, bad: Any
) -> None:
    given: dict[str, Any] = {"capacity": 8, "second": lengths, "second_capacity": 8, name: bad}
    if name == "max_documents" and bad is None:
        assert pack_lengths(lengths, **given) == ([[0, 1]] if lengths else [])
        return
    with pytest.raises(ValueError, match="it must be a whole number, at least 1|both or neither"):
        pack_lengths(lengths, **given)


def test_limits_may_be_numbers_of_numpy() -> None:
    assert pack_lengths([3, 5] * 9, np.int64(80)) == [list(range(18))]  # type: ignore[arg-type]
    assert pack_lengths([3, 5], np.int64(80), max_documents=np.int32(1)) == [[0], [1]]  # type: ignore[arg-type]


def test_packing_is_fast() -> None:
    random = np.random.default_rng(0)
    sizes = np.minimum(random.integers(0, 21, 50_000) * 144 + random.integers(1, 500, 50_000), 8192)
    start = time.process_time()
    pack_lengths(sizes, 8192)
    assert len(sizes) / (time.process_time() - start) > 50_000  # a third of what is promised


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from data_packing import pack_lengths, Plan, build_index, write_shards, Ledger\n"
        "from data_packing import Document, Sample, Cost, Cursor\n"
        "import data_packing.formats, data_packing.mixture, data_packing.slices\n"
        "sys.exit('torch' in sys.modules or 'mllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
