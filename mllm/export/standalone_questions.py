"""What is asked about images, for connectors that read it.

See `standalone_processor`, with which this becomes one file. V views, L tokens of the longest
question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_packing.pack import join_questions
from mllm.models.geometry import Layout
from mllm.models.turns import asked_about


def questions_of(conversation: Any) -> list[str]:
    """Return for each image what is asked about it; answers are not.

    Args:
        conversation: messages, or several conversations.
    """
    if conversation and not isinstance(conversation[0], Mapping):
        return [question for one in conversation for question in questions_of(one)]
    parts: list[tuple[str | None, str | None]] = []
    for message in conversation:
        role, content = message["role"], message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            said = "" if role == "assistant" else part.get("text") or ""
            parts.append((role, said if part["type"] == "text" else None))
    return asked_about(parts)


def question_rows(
    questions: Sequence[str], layouts: Sequence[Layout], tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Return the ids of what is asked about each view [V, L], -1 behind their end.

    Args:
        questions: one for each image.
        layouts: of the images.
        tokenizer: makes ids of them.
    """
    if len(questions) != len(layouts):
        raise ValueError(f"{len(questions)} questions are given for {len(layouts)} images")
    rows = []
    for question, layout in zip(questions, layouts, strict=True):
        ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        rows += [np.array(ids, dtype=np.int64)] * len(layout.sizes)
    return join_questions(rows)
