"""The tokenizers of transformers' classes: their image token, and a chat template that begins.

A processor of transformers renders a conversation and hands the text to the tokenizer, which puts
its begin token in front unless the text has it. Here the chat template is all there is. So a
template that leaves the begin token to the tokenizer gets it on reading, and a tokenizer that would
add one to a template without it is kept from that on writing. Token ids are the same either way.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from mllm.models.chat_template import with_images
from mllm.models.checks import check_tokenizer
from mllm.models.errors import loading, read_json

_BEGIN = "{{- bos_token }}"
_QUESTION: Any = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]


def read_tokenizer(
    path: str | Path, image_id: int, asked_id: int | None = None
) -> tuple[PreTrainedTokenizerBase, str]:
    """Load the tokenizer of a class's folder (or hub id), and say which string its image token is.

    Args:
        path: the folder.
        image_id: the id of the image token by config.json.
        asked_id: the id of the token that the chat template writes for an image, where it is not
            the image token.

    Raises:
        ValueError: no tokenizer, or none that has the image token.
    """
    with loading("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    check_tokenizer(tokenizer, path)
    token = token_of(tokenizer, image_id)
    if not token:
        raise ValueError(
            f"{path}: config.json says that images are the token {image_id}, but the tokenizer has "
            f"{len(tokenizer)}; take both files from one checkpoint"
        )
    # a plain word becomes special, so that no text may hold it
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _older_template(path)
    asked = token if asked_id is None else token_of(tokenizer, asked_id)
    if not asked:
        raise ValueError(
            f"{path}: config.json says that an image begins with the token {asked_id}, but the "
            f"tokenizer has {len(tokenizer)}; take both files from one checkpoint"
        )
    with_images(tokenizer, asked)
    template: Any = tokenizer.chat_template
    if isinstance(template, str) and _adds_begin(tokenizer) and not _begins(tokenizer):
        tokenizer.chat_template = _BEGIN + template
    return tokenizer, token


def token_of(tokenizer: PreTrainedTokenizerBase, number: Any) -> str | None:
    """Return the token of an id that a config.json gives; None if the tokenizer has none."""
    if type(number) is not int or not 0 <= number < len(tokenizer):
        return None
    token: Any = tokenizer.convert_ids_to_tokens(number)
    return None if token is None else str(token)


def check_token(token: str, named: str, path: str | Path) -> None:
    """Refuse an image token that is not the one that a processor looks for.

    Raises:
        ValueError: naming both.
    """
    if token != named:
        raise ValueError(
            f"{path}: images are {token!r} by config.json and {named!r} for the processor; take "
            "both files from one checkpoint"
        )


def named_token(tokenizer: PreTrainedTokenizerBase, name: str, path: str | Path) -> str:
    """Return a special token that a processor looks up in the tokenizer by this name.

    Raises:
        ValueError: the tokenizer does not have the name.
    """
    text = getattr(tokenizer, name, None)
    if not isinstance(text, str):
        raise ValueError(
            f"{path}: the tokenizer names no {name}; it stands in the checkpoint's own "
            "tokenizer_config.json"
        )
    return text


def written_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy for a processor of transformers: it adds nothing to what the template writes.

    It pads on the left, as `generate` of several rows needs it, with the end token if it has no
    other.

    Raises:
        ValueError: the tokenizer cannot be kept from adding its begin token.
    """
    result = copy.deepcopy(tokenizer)
    result.padding_side = result.init_kwargs["padding_side"] = "left"
    if result.pad_token_id is None:
        result.pad_token = result.eos_token
    template = result.chat_template
    if not template or not _adds_begin(result):
        return result
    if _begins(result):
        _leave_begin(result)
        return result
    switched: Any = result
    if hasattr(switched, "add_bos_token"):
        switched.add_bos_token = False
    if _adds_begin(result):
        switched.backend_tokenizer.post_processor = None
    with tempfile.TemporaryDirectory() as folder:
        result.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
    if _adds_begin(result) or _adds_begin(again):
        raise ValueError(
            "the chat template does not write the begin token, but the tokenizer adds it, and so "
            "would transformers' processor: put {{ bos_token }} before the chat template"
        )
    return result


def _leave_begin(tokenizer: Any) -> None:
    """Leave the begin token to the tokenizer again, where that makes the same ids.

    Who renders a conversation and has the text tokenised in a second call would have two of them.
    """
    template, text = tokenizer.chat_template, _rendered(tokenizer)
    if template.startswith(_BEGIN):
        tokenizer.chat_template = template.removeprefix(_BEGIN)
        plain = tokenizer(_rendered(tokenizer)).input_ids
        if plain != tokenizer(text, add_special_tokens=False).input_ids:
            tokenizer.chat_template = template


def _adds_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its begin token before a text."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the begin token."""
    return _rendered(tokenizer).startswith(str(tokenizer.bos_token))


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.apply_chat_template(_QUESTION, tokenize=False))


def _older_template(path: str | Path) -> str | None:
    """The chat template of folders that keep it in a file of its own beside the processor."""
    file = cached_file(str(path), "chat_template.json", _raise_exceptions_for_missing_entries=False)
    return read_json(Path(file)).get("chat_template") if file else None
