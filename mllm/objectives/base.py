"""What an objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

Scope = Literal["token", "document", "global_batch"]


class Objective(nn.Module, ABC):
    """A family of loss. It sees hidden states, not logits, so it decides what the head is run on.

    An objective returns a sum and knows its weight (how many tokens or documents the sum is over)
    from the labels alone; the engine divides by the weight of the whole step over all ranks.

    Attributes:
        scope: what the sum is over.
    """

    scope: Scope = "token"

    @abstractmethod
    def forward(
        self, hidden_TD: Tensor, labels_T: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Sum of the loss over the pack, a scalar fp32 tensor on the graph of `hidden_TD`.

        Args:
            hidden_TD: hidden states of one pack after the final norm.
            labels_T: int64, aligned with the input (not shifted), -100 where nothing is learned.
            head: hidden states [N, D] → logits [N, V]. It must be called as often on every rank,
                whatever the data: under ZeRO-3 each call gathers the head's weight.
        """
