"""Weighted next-token cross-entropy at the learned positions only.

Legend: T tokens of a pack, D hidden width, V vocabulary, N learned positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm.objectives.base import Objective, Scope

IGNORED = -100
CHUNK_LOGITS = 2**26
"""Logits that one call of the head may produce (256 MiB of fp32)."""


class LanguageModeling(Objective):
    """Cross-entropy of every learned token given what stands before it in its document.

    The head runs on the hidden states whose next token is learned and on no others: half of an
    image-text pack is image and prompt. It runs in a fixed number of calls that depends on the
    capacity of a pack alone, so that ranks never disagree under ZeRO-3.

    Args:
        capacity: tokens of a full pack.
        vocabulary: width of the logits.
    """

    scope: Scope = "token"

    def __init__(self, capacity: int, vocabulary: int) -> None:
        super().__init__(capacity, vocabulary)
        rows = max(1, CHUNK_LOGITS // vocabulary)
        self.calls = math.ceil(capacity / rows)

    def forward(
        self,
        hidden_TD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """See `Objective.forward`."""
        positions_N = learned_positions(weights_T)
        parts = (hidden_TD[positions_N], labels_T[positions_N + 1], weights_T[positions_N + 1])
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        for hidden_ND, labels_N, weights_N in zip(
            *(part.tensor_split(self.calls) for part in parts), strict=True
        ):
            losses_N = F.cross_entropy(head(hidden_ND).float(), labels_N, reduction="none")
            total = total + (weights_N * losses_N).sum()
        return total


def learned_positions(weights_T: Tensor) -> Tensor:
    """Positions [N] whose next token counts.

    The first token of every document has no weight, so nothing is predicted across documents.
    """
    return torch.nonzero(weights_T[1:]).squeeze(1)
