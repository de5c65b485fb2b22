"""A loss curve as inline SVG, coloured by the page's own variables, readable without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = ["loss_curve", "smoothed"]

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 34, 10, 10, 26
HOVERS = 48
"""Columns that tell their values under the pointer."""

Point = tuple[float, float]


def smoothed(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential mean with the bias of its start removed (Kingma and Ba, arXiv 1412.6980)."""
    result, mean = [], 0.0
    for number, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**number))
    return result


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover a range; about `count` of them."""
    span = max(high - low, 1e-9)
    rough = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def loss_curve(points: Sequence[Point], title: str) -> str:
    """Return an <svg> of (useful tokens, loss): every step faint, their running mean strong.

    Args:
        points: in the order of the steps; fewer than two make an empty frame.
        title: what a screen reader says.
    """
    if len(points) < 2:
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)}"><text class="tick" x="{WIDTH / 2}" y="{HEIGHT / 2}" '
            'text-anchor="middle">no steps to draw</text></svg>'
        )
    means = smoothed([loss for _, loss in points])
    losses = [loss for _, loss in points]
    top, least = max(*means, _quantile(losses, 0.98)), min(losses)
    margin = 0.04 * (top - least) or 1.0
    low, high = 0.0 if 0 <= least < top / 2 else least - margin, top + margin
    end = points[-1][0] or 1

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * tokens / end

    def y(loss: float) -> float:
        share = (min(loss, high) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    raw = _path([(x(tokens), y(loss)) for tokens, loss in points])
    mean = _path([(x(t), y(value)) for (t, _), value in zip(points, means, strict=True)])
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y(v) + 3.5:.1f}" text-anchor="end">{v:g}</text>'
        for v in ticks(low, high)
    )
    marks = "".join(
        f'<text class="tick" x="{x(v):.1f}" y="{HEIGHT - 8}" text-anchor='
        f'"{"start" if v == 0 else "end" if x(v) > WIDTH - 40 else "middle"}">{_short(v)}</text>'
        for v in ticks(0, end, 3)
    )
    last = f'<circle class="dot" cx="{x(end):.1f}" cy="{y(means[-1]):.1f}" r="4"/>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{grid}{marks}<path class="raw" d="{raw}"/>'
        f'<path class="mean" d="{mean}"/>{last}'
        f"{_hovers(points, means, x)}</svg>"
    )


def _hovers(points: Sequence[Point], means: Sequence[float], x: object) -> str:
    assert callable(x)
    every = max(1, len(points) // HOVERS)
    rows = []
    width = (WIDTH - LEFT - RIGHT) / max(1, len(points) / every)
    for at in range(0, len(points), every):
        tokens, loss = points[at]
        rows.append(
            f'<rect class="hover" x="{x(tokens) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>step {at + 1}: {tokens:,.0f} tokens, '
            f"loss {loss:.3f}, mean {means[at]:.3f}</title></rect>"
        )
    return "".join(rows)


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _short(value: float) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"
