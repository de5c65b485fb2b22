"""The course of the learning rate."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from mllm.training.schedule import FLOOR, factor


@pytest.mark.parametrize("course", ["cosine", "linear", "constant", "wsd"])
def test_the_rate_rises_and_falls(course: Any) -> None:
    factors = [factor(step, 100, 0.1, course) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert factors[10] == 1.0
    assert all(0 < value <= 1 for value in factors)
    end = 1.0 if course == "constant" else FLOOR
    assert factors[-1] == pytest.approx(end, abs=0.02)
    assert factor(0, 1, 0.0, course) <= 1.0


def test_wsd_stays_and_then_falls_by_the_same_share_every_step() -> None:
    factors = [factor(step, 100, 0.1, "wsd", 0.2) for step in range(100)]
    assert set(factors[10:80]) == {1.0}
    ratios = [b / a for a, b in pairwise(factors[79:])]
    assert ratios == pytest.approx([FLOOR ** (1 / 20)] * 20)
    assert factors[-1] == pytest.approx(FLOOR)
    assert factor(99, 100, 0.0, "wsd") == pytest.approx(FLOOR)
    assert [factor(s, 100, 0.0, "wsd") for s in (89, 90)] == [1.0, pytest.approx(FLOOR**0.1)]


def test_a_run_of_few_steps_has_them_all() -> None:
    for total in range(1, 6):
        values = [factor(step, total, 0.5, "wsd", 0.5) for step in range(total)]
        assert all(0 < value <= 1 for value in values)
