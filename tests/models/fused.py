"""What tests of fusions share: packs, logits, and those of the text model alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from data_packing.document import Document
from data_packing.pack import Pack, collate
from mllm.models import attention
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.conftest import documents

CROSS = {"name": "cross_attention", "every": 1}


def packed(processor: Processor, chosen: list[Document] | None = None) -> Pack:
    return collate([processor.encode(one) for one in chosen or documents()], 0)


def logits(model: MultimodalModel, pack: Pack) -> Tensor:
    views = (pack.pixels, pack.sizes, pack.order, pack.bags)
    hidden = model.hidden_states(pack.input_ids, *views, cu_seqlens=pack.cu_seqlens)
    return model.lm_head(hidden)[0]


def text_logits(model: MultimodalModel, pack: Pack) -> Tensor:
    """What the language model alone makes of the same ids."""
    language: Any = model.language_model
    with attention.packed_call(language.base_model, language.config.num_hidden_layers):
        hidden = language.base_model(
            pack.input_ids[None],
            position_ids=pack.position_ids[None],
            cu_seqlens=pack.cu_seqlens,
            use_cache=False,
        ).last_hidden_state
    return model.lm_head(hidden)[0]
