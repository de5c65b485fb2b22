"""The course of the learning rate: a pure function of the step, so nothing has to be saved."""

from __future__ import annotations

import math
from typing import Literal

from mllm.recipe_train import WSD_DECAY

Schedule = Literal["cosine", "linear", "constant", "wsd"]

FLOOR = 0.1
"""What all courses but the constant one end at, as a fraction of the peak."""


def factor(
    step: int, total: int, warmup: float, schedule: Schedule, decay: float | None = None
) -> float:
    """What the peak learning rate is multiplied with at one step.

    Warm-up, stable, decay (wsd; Hu et al. 2024, arXiv 2404.06395, section 4) stays at the peak and
    falls exponentially at the end, so that a run can be prolonged from before its fall.

    Args:
        step: 0-based, below `total`.
        total: steps of the run.
        warmup: fraction of the run during which the rate rises linearly from near zero.
        schedule: the course after the warmup; cosine and linear fall to a tenth all the way.
        decay: fraction of the run that falls under wsd.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        rising = max(rising, total - round((decay or WSD_DECAY) * total))
        return 1.0 if step < rising else FLOOR ** ((step - rising + 1) / (total - rising))
    progress = (step - rising) / max(1, total - rising)
    if schedule == "linear":
        return 1.0 - (1.0 - FLOOR) * progress
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))
