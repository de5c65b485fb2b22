from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_packing.mixture import Mixture, shuffled

counts = st.lists(st.integers(1, 30), min_size=1, max_size=4)
weights = st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.0])


def epoch(mixture: Mixture, number: int) -> Counter[tuple[int, int]]:
    source, unit = mixture.take(mixture.start(number), mixture.start(number + 1))
    return Counter(zip(source.tolist(), unit.tolist(), strict=True))


@given(counts, st.integers(0, 5), st.integers(0, 2**63))
def test_weight_one_takes_every_document_once(sizes: list[int], at: int, seed: int) -> None:
    mixture = Mixture(sizes, [1.0] * len(sizes), seed)
    every = {(source, unit): 1 for source, size in enumerate(sizes) for unit in range(size)}
    assert epoch(mixture, at) == every


def test_weight_two_takes_each_twice_and_a_half_takes_the_other_half_next() -> None:
    mixture = Mixture([10, 10], [2.0, 0.5], seed=0)
    first, second = epoch(mixture, 0), epoch(mixture, 1)
    assert [first[0, unit] for unit in range(10)] == [2] * 10
    halves = [{unit for source, unit in part if source == 1} for part in (first, second)]
    assert len(halves[0]) == 5
    assert halves[0] | halves[1] == set(range(10))


@given(counts, st.data())
def test_any_stretch_of_the_stream_is_the_same_however_it_is_reached(
    sizes: list[int], data: st.DataObject
) -> None:
    share = [data.draw(weights) for _ in sizes]
    mixture = Mixture(sizes, share, seed=3)
    end = mixture.start(12)
    start = data.draw(st.integers(0, end))
    stop = data.draw(st.integers(start, end))
    whole = np.stack(mixture.take(0, end))
    part = np.stack(Mixture(sizes, share, seed=3).take(start, stop))
    assert (part == whole[:, start:stop]).all()


def test_orders_differ_by_seed_and_epoch() -> None:
    def order(seed: int, at: int) -> list[int]:
        mixture = Mixture([50], [1.0], seed)
        return mixture.take(mixture.start(at), mixture.start(at + 1))[1].tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, at)) for seed in (0, 1) for at in (0, 1)}) == 4


def test_the_shuffle_is_fixed_for_ever_and_fair() -> None:
    assert shuffled(8, 0, 1).tolist() == [4, 0, 1, 5, 7, 3, 2, 6]
    first = [int(shuffled(4, seed)[0]) for seed in range(4000)]
    assert all(900 < count < 1100 for count in Counter(first).values())


def test_wrong_weights_are_refused() -> None:
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            Mixture([3], [weight], 0)
    with pytest.raises(ValueError, match="2 sources but 1 weights"):
        Mixture([3, 3], [1.0], 0)
    with pytest.raises(ValueError, match="no source has a usable document"):
        Mixture([0], [1.0], 0)
