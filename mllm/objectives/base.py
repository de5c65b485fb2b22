"""What an objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

Scope = Literal["token", "document", "global_batch"]


class Objective(nn.Module, ABC):
    """A family of loss. It sees hidden states, not logits, so it decides what the head is run on.

    An objective returns a weighted sum; the loop divides it by the sum of the objective's own
    weights in the whole step, over all ranks. So an objective must not divide by anything itself.

    Args:
        capacity: tokens of a full pack.
        vocabulary: width of the logits.

    Attributes:
        scope: what the sum is over.
    """

    scope: Scope = "token"

    def __init__(self, capacity: int, vocabulary: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self,
        hidden_TD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Sum of weight * loss over the pack, a scalar fp32 tensor on the graph of `hidden_TD`.

        Args:
            hidden_TD: hidden states of one pack after the final norm.
            labels_T: int64, aligned with the input (not shifted), -100 where nothing is learned.
            weights_T: float32, aligned with the labels; 0 where this objective learns nothing.
            head: hidden states [N, D] → logits [N, V]. It must be called as often on every rank,
                whatever the data: under ZeRO-3 each call gathers the head's weight.
        """
