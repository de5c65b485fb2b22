from __future__ import annotations

from dataclasses import replace

import pytest

from mllm.evaluation.measure import BARS
from mllm.evaluation.page import page
from mllm.evaluation.wording import figure_text, interval_text, limit_text, value_text

GAP, CHOICE, CATEGORY, TEXT = BARS.values()


@pytest.mark.parametrize(
    ("bar", "value", "text"),
    [
        (TEXT, 0.15, "+0.15"),
        (TEXT, 0.152, "+0.152"),
        (TEXT, 0.149996, "+0.149996"),
        (TEXT, 0.1444, "+0.14"),
        (TEXT, -0.15, "−0.15"),
        (TEXT, 0.15 + 1e-12, "+0.15"),
        (GAP, 2.118, "+2.12"),
        (GAP, 0.998, "+0.998"),
        (CHOICE, 0.38, "38"),
        (CHOICE, 0.3798, "37.98"),
        (CHOICE, 0.3791, "37.9"),
        (CHOICE, 0.442, "44.2"),
        (CATEGORY, 0.3, "+30"),
        (CATEGORY, 0.29996, "+29.996"),
        (CATEGORY, 0.0, "+0"),
        (CATEGORY, -0.021, "−2.1"),
    ],
)
def test_a_value_has_the_digits_that_tell_it_from_its_bar(
    bar: object, value: float, text: str
) -> None:
    assert value_text(bar, value) == text  # type: ignore[arg-type]


def test_the_terminal_and_the_page_show_that_a_bar_was_missed() -> None:
    figure = {"value": 0.152, "low": 0.1, "high": 0.2}
    line = "Plain text, change of loss: +0.152 nats/token (95 % interval +0.10 to +0.20; "
    assert figure_text("text", figure) == line + "bar ≤ +0.15 nats/token: NOT reached)"
    html = page({"figures": {"text": figure}}, {})
    assert html.count("+0.152") == 2
    assert "+0.15 <small>" not in html


def test_intervals_and_bars() -> None:
    assert interval_text(TEXT, {"low": 0.1, "high": 0.1502}) == "+0.10 to +0.1502"
    assert [limit_text(bar) for bar in (GAP, CHOICE, CATEGORY, TEXT)] == [
        "≥ +1.00 nats/token",
        "≥ 38 %",
        "≥ +30 points",
        "≤ +0.15 nats/token",
    ]
    assert limit_text(replace(CHOICE, limit=0.385)) == "≥ 38.5 %"
