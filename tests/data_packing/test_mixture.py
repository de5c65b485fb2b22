from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
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
        Part.everywhere(Rate(share), size, source, 1)
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
    mixture = Mixture([Part.everywhere(Rate(2.0, 4), 10, 0, 1)], seed=0)
    epochs = [epoch(mixture, number) for number in range(5)]
    assert [part.total() for part in epochs] == [4] * 5
    assert sum(epochs, Counter()) == {(0, unit): 2 for unit in range(10)}
    uncapped = Part.everywhere(Rate(2.0, 21), 10, 0, 1)
    assert uncapped.per_turn == 20


def test_a_decimal_weight_is_what_was_written() -> None:
    part = Part.everywhere(Rate(0.1), 30, 0, 1)
    assert [part.span(turn) for turn in range(3)] == [(0, 3), (3, 6), (6, 9)]


def taken(parts: Sequence[Part], turn: int, windows: int) -> int:
    return sum(stop - start for start, stop in (part.span(turn * windows) for part in parts))


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    cap=st.integers(1, 60),
    epochs=st.integers(1, 20),
)
def test_the_windows_of_a_capped_source_take_the_cap_together_in_every_epoch(
    sizes: list[int], cap: int, epochs: int
) -> None:
    windows, whole = len(sizes), sum(sizes)
    ends = [Fraction(sum(sizes[:at]), whole) for at in range(windows + 1)]
    parts = [
        Part.inside(Rate(1.0, cap), size, 0, at, windows, (ends[at], ends[at + 1]))
        for at, size in enumerate(sizes)
    ]
    for turn in range(epochs):
        assert taken(parts, turn, windows) == min(cap, whole)
        for part in parts:
            start, stop = part.span(turn * windows)
            assert (start, stop - start) >= (0, 0)
            assert start == (part.span((turn - 1) * windows)[1] if turn else 0)
    spread = [part.span(199 * windows)[1] / 200 - part.per_turn for part in parts]
    assert max(map(abs, spread)) < 0.05, "some window gives more than its share, or less"


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    weight=weights,
    epochs=st.integers(1, 20),
)
def test_windows_of_a_weight_take_its_share_of_each(
    sizes: list[int], weight: float, epochs: int
) -> None:
    windows = len(sizes)
    parts = [Part.inside(Rate(weight), size, 0, at, windows, None) for at, size in enumerate(sizes)]
    for part, size in zip(parts, sizes, strict=True):
        assert abs(part.span((epochs - 1) * windows)[1] - weight * size * epochs) <= 1
    if len(set(sizes)) == 1:
        total = sum(taken(parts, turn, windows) for turn in range(epochs))
        assert total == int(Fraction(str(weight)) * sum(sizes) * epochs)


def test_every_visit_mixes_its_sources_in_another_order() -> None:
    mixture = mix([20, 20], [1.0, 1.0], 0)
    orders = [mixture.take(40 * at, 40 * at + 40)[0].tolist() for at in range(3)]
    assert len({tuple(order) for order in orders}) == 3


def test_a_source_in_every_window_gives_each_visit_its_part_of_an_epoch() -> None:
    part = Part.everywhere(Rate(1.0), 10, 0, 4)
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
