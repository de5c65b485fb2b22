"""The course of the learning rate: a pure function of the step, so nothing has to be saved."""

from __future__ import annotations

import math
from typing import Literal

FLOOR = 0.1
"""What the cosine and linear courses end at, as a fraction of the peak."""


def factor(
    step: int, total: int, warmup: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """What the peak learning rate is multiplied with at one step.

    Args:
        step: 0-based, below `total`.
        total: steps of the run.
        warmup: fraction of the run during which the rate rises linearly from near zero.
        schedule: the course after the warmup; cosine and linear fall to a tenth.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - rising) / max(1, total - rising)
    if schedule == "linear":
        return 1.0 - (1.0 - FLOOR) * progress
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))
