"""Chat templates that know images.

A language model's own template takes the content of a turn as text. Users of multimodal models, and
servers, hand it over as a list of parts, `{"type": "image"}` and `{"type": "text", "text": …}`.
`with_images` makes the first kind take the second as well; what it writes for texts stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

_FLATTEN = (
    "{%- set given = namespace(turns=[]) %}"
    "{%- for message in messages %}"
    "{%- if message['content'] is string or message['content'] is not iterable %}"
    "{%- set given.turns = given.turns + [message] %}"
    "{%- else %}"
    "{%- set turn = namespace(text='') %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{%- set turn.text = turn.text + part['text'] %}"
    "{%- elif part['type'] == 'image' %}{%- set turn.text = turn.text + IMAGE %}"
    "{%- else %}{{- raise_exception('a part of a turn is neither text nor image') }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- set given.turns = given.turns + [dict(message, content=turn.text)] %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- set messages = given.turns %}"
)


def with_images(tokenizer: PreTrainedTokenizerBase, asked: str) -> None:
    """Make the tokenizer's chat template take parts; nothing changes where it does, or has none.

    Args:
        tokenizer: changed in place.
        asked: what is to be written for an image.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {
            name: flattening(tokenizer, one, asked) for name, one in template.items()
        }
    elif template:
        tokenizer.chat_template = flattening(tokenizer, template, asked)


def takes_parts(
    tokenizer: PreTrainedTokenizerBase, asked: str, template: str | None = None
) -> bool:
    """Return whether a chat template writes `asked` for a part that is an image.

    Args:
        tokenizer: renders it.
        asked: what is looked for.
        template: left out, the tokenizer's own.
    """
    content: Any = [{"type": "image"}, {"type": "text", "text": "probe"}]
    try:
        text: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )
    except Exception:  # a template is somebody's program: whatever it raises, it takes no parts
        return False
    return asked in text and "probe" in text and "'type'" not in text


def unknown_to(template: str, names: Iterable[str]) -> list[str]:
    """Return which names are no variables of a template; none of one that cannot be parsed."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # only parses
    try:
        used = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:  # tags of transformers' own
        return []
    return sorted(set(names) - used)


def flattening(tokenizer: PreTrainedTokenizerBase, template: str, asked: str) -> str:
    """Return a chat template that takes parts; arguments as `takes_parts`."""
    if takes_parts(tokenizer, asked, template):
        return template
    first_line = "\n" if template.startswith("\n") else ""  # a newline after a tag is eaten
    return _FLATTEN.replace("IMAGE", repr(asked)) + first_line + template
