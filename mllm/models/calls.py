"""How a `Processor` is called by those who know transformers' processors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

from data_packing.document import Document
from data_packing.pack import join_orders, join_questions, join_views
from mllm.models.expansion import Expander
from mllm.models.messages import document_of, images_per_text, is_batch
from mllm.models.template import Template


class Calls(ABC):
    """Texts and images, or conversations, to what a model takes."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    expander: Expander
    _reads_text: bool

    @abstractmethod
    def _pixels(self, document: Document) -> list[NDArray[np.uint8]]:
        """Return the views of a document's images."""

    @abstractmethod
    def _asked(self, document: Document) -> list[NDArray[np.int64]]:
        """Return what is asked about each view."""

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return what the model takes for texts that hold a placeholder for every image.

        Args:
            images: one, a list, or a list for every text; see `messages.image_of`.
            text: one or several, as `apply_chat_template` writes them; rows are padded on the left.
            return_tensors: "pt".
            add_special_tokens: whether a begin token is put before a text that has none.
            kwargs: refused, `padding` excepted.

        Raises:
            ValueError: no text, more or fewer images than placeholders, an unknown argument, or
                images for a connector that reads what is asked: a text does not say which part
                that is, `apply_chat_template` knows.
        """
        if unknown_ones := kwargs.keys() - {"padding"}:
            raise ValueError(f"the processor takes no argument {min(unknown_ones)!r}")
        if text is None or return_tensors != "pt":
            raise ValueError("the processor makes tensors of torch ('pt') from texts and images")
        rows = self.template.tokenize([text] if isinstance(text, str) else text, add_special_tokens)
        counts = [int((row == self.template.image_id).sum()) for row in rows]
        shown = images_per_text(images, counts)
        documents = [Document(tuple(row)) for row in shown]
        if self._reads_text and any(shown):
            raise ValueError(
                "this model's connector reads what is asked about an image: hand over the "
                "conversation, apply_chat_template(messages, tokenize=True, return_dict=True)"
            )
        return BatchFeature(self._batch(list(zip(rows, documents, strict=True))))

    def apply_chat_template(
        self,
        conversation: Any,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Write a conversation, or several, as the chat template does; as in transformers.

        Args:
            conversation: messages; see `messages.document_of` for images in them.
            tokenize: return ids instead of text.
            return_dict: with `tokenize`, return what the model takes, pixels included.
            return_tensors: ids are lists without it.
            add_generation_prompt: end with what begins an answer.
            kwargs: for the template.

        Raises:
            ValueError: a message or an image that cannot be read.
        """
        batch = is_batch(conversation)
        texts: Any = self.tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )
        if not tokenize:
            return texts
        documents = [document_of(one) for one in (conversation if batch else [conversation])]
        rows = self.template.tokenize([texts] if isinstance(texts, str) else texts)
        for ids, document in zip(rows, documents, strict=True):
            images_per_text(document.images, [int((ids == self.template.image_id).sum())])
        inputs = BatchFeature(self._batch(list(zip(rows, documents, strict=True))))
        if return_dict:
            return inputs
        if return_tensors:
            return inputs["input_ids"]
        expanded = [
            ids[seen.bool()].tolist()
            for ids, seen in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return expanded if batch else expanded[0]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Turn what `generate` returned into texts; transformers' pipeline asks for it."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens)

    def _batch(self, rows: Sequence[tuple[NDArray[np.int64], Document]]) -> dict[str, Tensor]:
        """Expand rows of ids with their documents' images; see `prompts`."""
        expanded = [self.expander.expand(ids, document) for ids, document in rows]
        longest = max(len(row.ids) for row in expanded)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = np.full((len(rows), longest), pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, target, seen in zip(expanded, ids, mask, strict=True):
            target[longest - len(row.ids) :] = row.ids
            seen[longest - len(row.ids) :] = 1
        result = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if views := [view for _, document in rows for view in self._pixels(document)]:
            result["pixels"], result["sizes"] = join_views(views)
            named = zip(("order", "bags"), join_orders(expanded), strict=True)
            result |= {name: values for name, values in named if len(values)}
            if self._reads_text:
                asked = [one for _, document in rows for one in self._asked(document)]
                result["asked"] = join_questions(asked)
        return result

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Turn one row of ids into text, as the tokenizer does."""
        return str(self.tokenizer.decode(*args, **kwargs))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Turn rows of ids into texts, as the tokenizer does."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))
