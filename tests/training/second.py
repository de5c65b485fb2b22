"""Objectives for tests: a second one, because what several share cannot be tested with one, and
one that documents can spoil."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from mllm import recipe_parts
from mllm.objectives import OBJECTIVES, Objective

NAME = "to_ones"
TRAPS = "traps"


class ToOnes(Objective):
    """How far the hidden state of every learned token is from ones."""

    def forward(
        self,
        hidden_TD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """See `Objective.forward`."""
        distances_T = (hidden_TD.float() - 1).square().mean(1)
        return (weights_T * distances_T).sum()


class Traps(ToOnes):
    """As `ToOnes`, but "#" makes the loss infinite, and "%" the gradient; never both."""

    def forward(
        self,
        hidden_TD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """See `Objective.forward`."""
        loss = super().forward(hidden_TD, labels_T, weights_T, head)
        if (labels_T == token("#")).any():
            loss = loss + math.inf  # the gradient stays as it is
        if (labels_T == token("%")).any():
            loss = loss + (hidden_TD.float().square().sum() * 0).sqrt()  # infinitely steep at 0
        return loss


def token(letter: str) -> int:
    """The id that tiny.make_models gives a letter."""
    return 7 + ord(letter) - 32


def register() -> None:
    """Make them known, to recipes too."""
    OBJECTIVES[NAME] = ToOnes
    OBJECTIVES[TRAPS] = Traps
    recipe_parts.OBJECTIVE_NAMES = ("language_modeling", NAME, TRAPS)
