"""The one module that DeepSpeed wraps: model and objectives together.

Under ZeRO-3 a weight exists only inside forward, so everything that touches a weight happens here.
T tokens of a pack, V views of its images, B bytes of their pixels, K objectives, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mllm.objectives import OBJECTIVES
from mllm.objectives.language_modeling import IGNORED

if TYPE_CHECKING:
    from mllm.models.modeling import MultimodalModel


class TrainStep(nn.Module):
    """One pack in, the sum of every objective's losses out.

    Args:
        model: a MultimodalModel.
        objectives: names in `OBJECTIVES`.
        capacity: tokens of a full pack.
    """

    def __init__(self, model: MultimodalModel, objectives: tuple[str, ...], capacity: int) -> None:
        super().__init__()
        self.model = model
        vocabulary = head_rows(model)
        self.objectives = nn.ModuleDict(
            {name: OBJECTIVES[name](capacity, vocabulary) for name in objectives}
        )

    def forward(
        self,
        input_ids_T: Tensor,
        labels_T: Tensor,
        weights_KT: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        pixels: Tensor,
        sizes: Tensor,
        order: Tensor,
        bags: Tensor,
        asked: Tensor,
    ) -> Tensor:
        """The weighted sum of each objective over the pack, [K] in fp32, in the recipe's order.

        Args:
            input_ids_T, labels_T, position_ids_T: int64.
            weights_KT: float32, a row per objective.
            cu_seqlens: int32 [documents + 1].
            pixels: uint8 [B], each view as [height, width, 3], one after another.
            sizes: int32 [V, 2], (height, width) of each view, on the CPU.
            order, bags, asked: int64, which visual tokens stand where, and what is asked about
                views; see `Pack`.
        """
        assert weights_KT.shape[0] == len(self.objectives)
        if input_ids_T.numel() == 0:  # a rank without a pack takes part all the same
            input_ids_T = input_ids_T.new_zeros(2)
            labels_T = labels_T.new_full((2,), IGNORED)
            weights_KT = weights_KT.new_zeros(len(self.objectives), 2)
            position_ids_T = torch.arange(2, device=position_ids_T.device)
            cu_seqlens = torch.tensor([0, 2], dtype=torch.int32, device=cu_seqlens.device)
        hidden_BTD = self.model.hidden_states(
            input_ids=input_ids_T[None],
            pixels=pixels,
            sizes=sizes,
            order=order,
            bags=bags,
            asked=asked,
            position_ids=position_ids_T[None],
            cu_seqlens=cu_seqlens,
        )
        sums = [
            objective(hidden_BTD[0], labels_T, weights_T, self.model.lm_head)
            for objective, weights_T in zip(self.objectives.values(), weights_KT, strict=True)
        ]
        return torch.stack(sums)


def head_rows(model: MultimodalModel) -> int:
    """Rows of the model's input embedding, which is the width of its logits."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.num_embeddings
