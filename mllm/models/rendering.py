"""Turns of a conversation as text: what the tokenizer's chat template makes of them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data_packing.document import DocumentError
from mllm.models.chat_template import takes_parts
from mllm.models.turns import Turn

_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What the Python inside a template raises on a text that it was not written for."""


class Renderer:
    """The chat template of one tokenizer.

    Args:
        tokenizer: may have none; then conversations are refused.
        asked, written: what the template writes for an image, and what takes its place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, asked: str, written: str) -> None:
        self.tokenizer, self.asked, self.written = tokenizer, asked, written

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the chat template is handed images as parts, not as text."""
        return takes_parts(self.tokenizer, self.asked)

    def render(self, messages: list[Turn], generation_prompt: bool = False) -> str:
        """Return the text of turns.

        Raises:
            DocumentError: the chat template refuses them.
            ValueError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, so it cannot write a conversation: choose an "
                "instruction-tuned language model or add a chat_template.jinja to its folder"
            )
        self.tokenizer.get_chat_template()  # several and no default: no fault of the document
        turns: list[Any] = [
            {
                "role": message.role,
                "content": message.as_parts() if self.takes_parts else message.as_text(self.asked),
            }
            for message in messages
        ]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            raise DocumentError(f"the chat template refuses it: {error}") from error
        except _FAILURES as error:
            what = f"{type(error).__name__}: {error}"
            raise DocumentError(f"the chat template fails on it: {what}") from error
        assert isinstance(text, str)
        return text.replace(self.asked, self.written)

    def prefix(self, text: str, messages: list[Turn], generation_prompt: bool = False) -> int:
        """Return the length of the first turns as rendered, checked to be how the whole begins.

        Raises:
            DocumentError: it begins in another way.
        """
        start = self.render(messages, generation_prompt)
        if not text.startswith(start):
            raise DocumentError(
                "the chat template writes earlier turns differently once later ones follow, so "
                "the answers cannot be told apart"
            )
        return len(start)
