from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_packing.mixture import Mixture, Part, Rate, shuffled

counts = st.lists(st.integers(1, 30), min_size=1, max_size=4)
weights = st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.0])


def mix(sizes: Sequence[int], shares: Sequence[float], seed: int) -> Mixture:
    parts = [
        Part.of(Rate(share), size, source, 0, 1, resident=True)
        for source, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]
    return Mixture(parts, seed)


def epoch(mixture: Mixture, number: int) -> Counter[tuple[int, int]]:
    source, unit = mixture.take(mixture.start(number), mixture.start(number + 1))
    return Counter(zip(source.tolist(), unit.tolist(), strict=True))


@given(counts, st.integers(0, 5), st.integers(0, 2**63))
def test_weight_one_takes_every_document_once(sizes: list[int], at: int, seed: int) -> None:
    mixture = mix(sizes, [1.0] * len(sizes), seed)
    every = {(source, unit): 1 for source, size in enumerate(sizes) for unit in range(size)}
    assert epoch(mixture, at) == every


def test_weight_two_takes_each_twice_and_a_half_takes_the_other_half_next() -> None:
    mixture = mix([10, 10], [2.0, 0.5], 0)
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
    mixture = mix(sizes, share, 3)
    end = mixture.start(12)
    start = data.draw(st.integers(0, end))
    stop = data.draw(st.integers(start, end))
    whole = np.stack(mixture.take(0, end))
    part = np.stack(mix(sizes, share, 3).take(start, stop))
    assert (part == whole[:, start:stop]).all()


def test_orders_differ_by_seed_and_epoch() -> None:
    def order(seed: int, at: int) -> list[int]:
        mixture = mix([50], [1.0], seed)
        return mixture.take(mixture.start(at), mixture.start(at + 1))[1].tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, at)) for seed in (0, 1) for at in (0, 1)}) == 4


def test_the_shuffle_is_fixed_for_ever_and_fair() -> None:
    assert shuffled(8, 0, 1).tolist() == [4, 0, 1, 5, 7, 3, 2, 6]
    first = [int(shuffled(4, seed)[0]) for seed in range(4000)]
    assert all(900 < count < 1100 for count in Counter(first).values())


def test_a_cap_takes_so_many_in_every_epoch_and_others_in_the_next() -> None:
    mixture = Mixture([Part.of(Rate(2.0, 4), 10, 0, 0, 1, resident=True)], seed=0)
    epochs = [epoch(mixture, number) for number in range(5)]
    assert [part.total() for part in epochs] == [4] * 5
    assert sum(epochs, Counter()) == {(0, unit): 2 for unit in range(10)}
    uncapped = Part.of(Rate(2.0, 21), 10, 0, 0, 1, resident=True)
    assert uncapped.per_turn == 20


@settings(deadline=None)
@given(
    windows=st.integers(2, 9),
    weight=weights,
    cap=st.sampled_from([None, 3, 20]),
    size=st.integers(1, 12),
    epochs=st.integers(1, 20),
)
def test_windows_of_a_source_take_together_what_it_is_to_give(
    windows: int, weight: float, cap: int | None, size: int, epochs: int
) -> None:
    """Each window rounds, and yet no epoch is off by more than the last fraction."""
    rate = Rate(weight, cap)
    parts = [Part.of(rate, size, 0, window, windows, resident=False) for window in range(windows)]
    asked = rate.of(size * windows)
    taken = 0
    for turn in range(epochs):
        for part in parts:
            start, stop = part.span(turn * windows)
            taken += stop - start
        assert taken == int(asked * (turn + 1))


def test_a_source_in_every_window_gives_each_visit_its_part_of_an_epoch() -> None:
    part = Part.of(Rate(1.0), 10, 0, 0, 4, resident=True)
    visits = [Mixture([part], 0, visit, visit + 1).take(0, 100)[1].tolist() for visit in range(8)]
    assert [len(own) for own in visits] == [2, 3, 2, 3] * 2
    for start in (0, 4):
        assert sorted(chain.from_iterable(visits[start : start + 4])) == list(range(10))


def test_wrong_rates_are_refused() -> None:
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            Rate(weight)
    with pytest.raises(ValueError, match="cap 0; it must be at least 1"):
        Rate(1.0, 0)
    with pytest.raises(ValueError, match="no source has a unit"):
        mix([0], [1.0], 0)
