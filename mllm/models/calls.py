"""How a `Processor` is called by those who know transformers' processors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

from data_packing.document import Document
from data_packing.pack import join_orders, join_questions, join_views
from mllm.models import rows
from mllm.models.chat_template import flattening, unknown_to
from mllm.models.expansion import Expander
from mllm.models.image_processor import check_images_kwargs
from mllm.models.messages import document_of, images_per_text, is_batch, plain
from mllm.models.rows import Rows
from mllm.models.template import Template

_ANY_TEMPLATE = {"add_generation_prompt", "continue_final_message"}
"""What may be asked of any template."""


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
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return what the model takes for texts that hold a placeholder for every image.

        Args:
            images: one, a list, or a list for every text; see `messages.image_of`.
            text: one or several, raw or as `apply_chat_template` writes them.
            videos, audio: refused.
            kwargs: the fields of `Rows`; `add_special_tokens`, see `Template.tokenize`;
                `return_tensors`, "pt"; all of them in `text_kwargs` too. Anything else is refused.

        Raises:
            ValueError: no text, more or fewer images than placeholders, an argument, or images for
                a connector that reads what is asked: a text does not say which part that is,
                `apply_chat_template` knows.
        """
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"the processor takes texts and images, no {name}")
        given = rows.spread(kwargs)
        if given.pop("return_tensors", "pt") != "pt" or text is None:
            raise ValueError("the processor makes tensors of torch ('pt') from texts and images")
        texts = [text] if isinstance(text, str) else [*text]
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError(
                "text is a string or a list of strings; a conversation goes through "
                "apply_chat_template(messages, tokenize=True, return_dict=True)"
            )
        begins, wanted = given.pop("add_special_tokens", None), rows.taken(given)
        check_images_kwargs(given)
        ids = self.template.tokenize(texts, begins)
        counts = [int((row == self.template.image_id).sum()) for row in ids]
        shown = images_per_text(images, counts)
        documents = [Document(tuple(row)) for row in shown]
        if self._reads_text and any(shown):
            raise ValueError(
                "this model's connector reads what is asked about an image: hand over the "
                "conversation, apply_chat_template(messages, tokenize=True, return_dict=True)"
            )
        return BatchFeature(self._batch(list(zip(ids, documents, strict=True)), wanted))

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write a conversation, or several, as the chat template does; as in transformers.

        Args:
            conversation: messages; see `messages.document_of` for images in them.
            chat_template: another one, or the name of one of the tokenizer's.
            tokenize: return ids instead of text.
            return_dict: with `tokenize`, return what the model takes, pixels included.
            return_tensors: ids are lists without it.
            processor_kwargs: the fields of `Rows`, and `add_special_tokens`.
            kwargs: for the template (`add_generation_prompt`, `continue_final_message`, `tools`,
                its own variables), and the fields of `Rows`.

        Raises:
            ValueError: a message or an image that cannot be read, or an argument that neither the
                template nor the processor knows.
        """
        batch = is_batch(conversation)
        turns = [plain(one) for one in (conversation if batch else [conversation])]
        asked = {name: kwargs.pop(name) for name in rows.TAKEN if name in kwargs}
        given = rows.spread({**asked, **(processor_kwargs or {})})
        begins, tensors = given.pop("add_special_tokens", False), given.pop("return_tensors", None)
        wanted = rows.taken(given)
        check_images_kwargs(given)
        tensors = tensors or return_tensors
        if tensors not in (None, "pt"):
            raise ValueError(f"ids become lists or tensors of torch ('pt'), not {tensors!r}")
        if not (return_dict or tensors):  # lists, which need no padding
            wanted = replace(wanted, padding=wanted.padding or True)
        texts = self._rendered(turns, chat_template, kwargs)
        if not tokenize:
            return texts if batch else texts[0]
        documents = [document_of(one) for one in turns]
        ids = self.template.tokenize(texts, begins)
        for row, document in zip(ids, documents, strict=True):
            images_per_text(document.images, [int((row == self.template.image_id).sum())])
        inputs = BatchFeature(self._batch(list(zip(ids, documents, strict=True)), wanted))
        if return_dict:
            return inputs
        if tensors:
            return inputs["input_ids"]
        lists = inputs["input_ids"].tolist()
        if asked.get("padding") in (None, False) and "attention_mask" in inputs:
            masks = inputs["attention_mask"].bool()
            lists = [
                row[seen].tolist() for row, seen in zip(inputs["input_ids"], masks, strict=True)
            ]
        return lists if batch else lists[0]

    def _rendered(
        self, turns: list[Any], chat_template: str | None, given: Mapping[str, Any]
    ) -> list[str]:
        """Conversations as the chat template writes them."""
        named = self.tokenizer.chat_template
        if chat_template is not None and not (isinstance(named, dict) and chat_template in named):
            asked = self.template.image_text.asked
            chat_template = flattening(self.tokenizer, chat_template, asked)
        template = self.tokenizer.get_chat_template(chat_template, given.get("tools"))
        said = {name for name, value in given.items() if value not in (None, False)}
        if unused := unknown_to(template, said.difference(_ANY_TEMPLATE)):
            raise ValueError(f"neither the chat template nor the processor takes {unused[0]!r}")
        write: Any = self.tokenizer.apply_chat_template
        return [str(write(one, chat_template=template, tokenize=False, **given)) for one in turns]

    def _batch(
        self, ids_and_documents: Sequence[tuple[NDArray[np.int64], Document]], wanted: Rows
    ) -> dict[str, Tensor]:
        """Expand rows of ids with their documents' images; see `prompts`."""
        expanded = [self.expander.expand(ids, document) for ids, document in ids_and_documents]
        result = wanted.batch(expanded, self.tokenizer)
        documents = [document for _, document in ids_and_documents]
        if views := [view for document in documents for view in self._pixels(document)]:
            result["pixels"], result["sizes"] = join_views(views)
            named = zip(("order", "bags"), join_orders(expanded), strict=True)
            result |= {name: values for name, values in named if len(values)}
            if self._reads_text:
                asked = [one for document in documents for one in self._asked(document)]
                result["asked"] = join_questions(asked)
        return result
