"""Figures as people read them: on the page, in the terminal and in the benchmarks' tables."""

from __future__ import annotations

import math
from typing import Any

from mllm.evaluation.measure import BARS, Bar

__all__ = [
    "figure_text",
    "interval_text",
    "limit_text",
    "loss_text",
    "percent_text",
    "value_text",
    "whole_text",
]

NOTHING = "–"
MOST_DIGITS = 9
"""After the point; a value that is like its bar even then is shown as the bar."""


def value_text(bar: Bar, value: float) -> str:
    """A value of a figure without its unit, with as many digits as tell it from the bar."""
    fewest = 1 if bar.unit in ("%", "points") else 2
    for digits in range(fewest, MOST_DIGITS + 1):
        text = _rounded(bar, value, digits)
        if text != _rounded(bar, bar.limit, digits):
            return text
    return _rounded(bar, bar.limit, fewest)


def _rounded(bar: Bar, value: float, digits: int) -> str:
    sign = "" if bar.unit == "%" else "+"
    scale = 100 if bar.unit in ("%", "points") else 1
    text = f"{value * scale:{sign}.{digits}f}"
    return (text.removesuffix(".0") if scale == 100 else text).replace("-", "−")


def interval_text(bar: Bar, figure: dict[str, Any]) -> str:
    """The 95 % interval of a figure."""
    return f"{value_text(bar, figure['low'])} to {value_text(bar, figure['high'])}"


def limit_text(bar: Bar) -> str:
    """What a figure must reach, with its unit."""
    return f"{'≥' if bar.least else '≤'} {value_text(bar, bar.limit)} {bar.unit}"


def figure_text(name: str, figure: dict[str, Any]) -> str:
    """A figure in one line for a terminal."""
    bar = BARS[name]
    if "value" not in figure:
        return f"{bar.title}: not measured ({figure.get('reason', 'no reason given')})"
    mark = "reached" if bar.met(figure["value"]) else "NOT reached"
    return (
        f"{bar.title}: {value_text(bar, figure['value'])} {bar.unit} "
        f"(95 % interval {interval_text(bar, figure)}; bar {limit_text(bar)}: {mark})"
    )


def whole_text(value: float | None) -> str:
    """A number without its fraction."""
    return NOTHING if value is None else f"{value:,.0f}"


def percent_text(share: float | None) -> str:
    """A share in whole percent."""
    return NOTHING if share is None else f"{100 * share:.0f} %"


def loss_text(value: float | None) -> str:
    """A loss in nats."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.2f}"
