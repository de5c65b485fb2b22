"""A second objective, because what several of them share cannot be tested with one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mllm import recipe_parts
from mllm.objectives import OBJECTIVES, Objective

NAME = "to_ones"


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


def register() -> None:
    """Make it known, to recipes too."""
    OBJECTIVES[NAME] = ToOnes
    recipe_parts.OBJECTIVE_NAMES = ("language_modeling", NAME)
