"""Tokenizers that add a begin token or do not, with chat templates that write it or do not."""

from __future__ import annotations

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.models.conftest import CHATML, make_tokenizer

BEGIN = "<|endoftext|>"
WRITES_BEGIN = f"{{{{ '{BEGIN}' }}}}" + CHATML
TEMPLATES = {"template writes it": WRITES_BEGIN, "template does not": CHATML}


def begin_tokenizer(adds: bool, chat_template: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with a begin token of its own."""
    tokenizer = make_tokenizer(chat_template)
    tokenizer.bos_token = BEGIN
    if adds:
        number = tokenizer.convert_tokens_to_ids(BEGIN)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, number)]
        )
    return tokenizer
