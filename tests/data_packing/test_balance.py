from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing_toys import dealt_order

from data_packing.balance import WINDOW, PackCost, balanced, contents, deal, straggler

costs_of_packs = st.lists(st.integers(0, 50), min_size=1, max_size=400)


def windows(packs: int, step: int) -> list[range]:
    """The packs that are sorted together: those of sixteen steps, and of all that is left."""
    count = max(1, packs // step // WINDOW)
    starts = [number * WINDOW * step for number in range(count)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], packs], strict=True)]


@given(costs_of_packs, st.integers(1, 9), st.integers(0, 5))
def test_every_window_keeps_its_packs_and_its_steps_are_neighbours(
    values: list[int], step: int, seed: int
) -> None:
    costs = np.array(values, dtype=np.float64)
    order = balanced(costs, step, seed)
    assert order.tolist() == balanced(costs, step, seed).tolist()
    for window in windows(len(costs), step):
        own = order[window.start : window.stop]
        assert sorted(own.tolist()) == list(window)
        steps = [costs[own[at : at + step]] for at in range(0, len(own), step)]
        for packs in steps:
            assert (np.diff(packs) <= 0).all()
        spans = sorted((packs.min(), packs.max()) for packs in steps)
        assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))
        if len(own) % step:
            assert len(steps[-1]) == len(own) % step
            assert steps[-1].max() == spans[0][1]


def test_the_steps_of_a_window_do_not_come_by_cost() -> None:
    costs = np.random.default_rng(0).random(64 * WINDOW)
    orders = {seed: balanced(costs, 64, seed) for seed in (0, 1)}
    for order in orders.values():
        means = costs[order].reshape(WINDOW, 64).mean(axis=1)
        assert abs(np.corrcoef(means, np.arange(WINDOW))[0, 1]) < 0.6
    assert orders[0].tolist() != orders[1].tolist()


def test_the_last_window_takes_the_steps_that_are_left_over() -> None:
    costs = np.random.default_rng(0).random(4 * (2 * WINDOW - 1) + 3)
    order = balanced(costs, 4, 0)
    by_cost = np.argsort(-costs)
    assert order[-3:].tolist() == by_cost[-3:].tolist()
    assert set(map(frozenset, order[:-3].reshape(-1, 4).tolist())) == set(
        map(frozenset, by_cost[:-3].reshape(-1, 4).tolist())
    )


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_pack_goes_to_one_rank(packs: int, world: int) -> None:
    dealt = [deal(packs, rank, world) for rank in range(world)]
    assert len({len(own) for own in dealt}) == 1
    assert Counter(at for own in dealt for at in own if at is not None) == Counter(range(packs))
    assert dealt_order(dealt) == list(range(packs))


def test_ranks_finish_together_in_every_micro_step_and_over_the_step() -> None:
    costs = np.sort(np.random.default_rng(0).random(64))[::-1]
    own = np.array([[costs[at or 0] for at in deal(64, rank, 8)] for rank in range(8)])
    for turn in range(8):
        assert own[:, turn].tolist() == sorted(own[:, turn], reverse=turn % 2 == 0)
        assert own[:, turn].min() >= own[:, min(7, turn + 1)].max() or turn == 7
    sums = own.sum(axis=1)
    in_turn = costs.reshape(8, 8).sum(axis=0)
    assert np.ptp(sums) < np.ptp(in_turn) / 4


def test_the_straggler_is_the_slowest_of_every_micro_step_over_the_mean() -> None:
    assert straggler([np.array([3.0, 1.0]), np.array([2.0, 2.0])], 2) == 5 / 4
    assert straggler([np.array([4.0, 3.0, 2.0])], 2) == (4 + 2) / 4.5, "a rank without a pack waits"
    assert straggler([np.array([4.0, 3.0, 2.0])], 1) == 1.0


def test_no_such_rank_is_refused() -> None:
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} of 2"):
            deal(3, rank, 2)


def test_what_packs_hold_and_cost() -> None:
    packs, tokens, patches = [[0, 2], [1]], np.array([3, 5, 4]), np.array([16, 0, 8])
    held = contents(packs, tokens, patches, False)
    assert [column.tolist() for column in held] == [[7, 5], [25, 25], [24, 0]]
    assert contents(packs, tokens, patches, True)[1].tolist() == [49, 25]
    assert PackCost(2.0, 0.5, 1.0).of(*held).tolist() == [14 + 12.5 + 24, 10 + 12.5]


@pytest.mark.parametrize("values", [(-1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (float("nan"), 1.0, 0.0)])
def test_costs_that_say_nothing_are_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        PackCost(*values)


def test_the_head_completes_a_step_with_cheap_packs_of_the_first_window() -> None:
    random = np.random.default_rng(0)
    costs = random.random(400)
    order = balanced(costs, 8, 1, head=3)
    assert sorted(order.tolist()) == list(range(400))
    first = set(range(3 + 16 * 8))
    cheapest = sorted(first, key=lambda at: costs[at])[:3]
    assert set(order[:3].tolist()) == set(cheapest)
    steps = costs[order[3 : 3 + 8 * (397 // 8)]].reshape(-1, 8)
    assert (np.diff(steps, axis=1) <= 0).all()
    assert float((steps.max(axis=1) - steps.min(axis=1)).mean()) < 0.1
    assert sorted(balanced(costs[:2], 8, 1, head=5).tolist()) == [0, 1]
