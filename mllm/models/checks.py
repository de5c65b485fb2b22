"""What a part's folder says of itself, looked at before its weights are loaded.

Libraries build a model of whatever its config.json says, and a tokenizer of no files at all; what
comes of that fails far from its cause, or not at all. Everything here names folder and field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from mllm.models.errors import loading
from mllm.recipe_yaml import closest

_ABOVE_ZERO = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
    *("n_embd", "n_head", "n_layer", "n_positions", "ffn_dim", "word_embed_proj_dim"),
    *("embed_dim", "depth", "num_heads", "mlp_ratio", "out_hidden_size", "num_patches"),
    *("patch_size", "temporal_patch_size", "spatial_merge_size", "hidden_sizes", "depths"),
}
_ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function"}
_HEADS = (
    ("embed_dim", "num_heads"),  # Qwen2-VL's, whose hidden_size is the language model's
    ("hidden_size", "num_heads"),
    ("hidden_size", "num_attention_heads"),
    ("n_embd", "n_head"),
    ("num_attention_heads", "num_key_value_heads"),
)
"""(what is divided, among how many); a width only where no other width of a head is given."""

_FLAT = ("qwen2_vl", "qwen2_5_vl")
"""Their first files have the fields of the text on top."""

_WORDS = ("a", "1", "的")
_ANOTHER = "copy the checkpoint's own config.json"


def read_config(what: str, path: str | Path, **options: Any) -> PreTrainedConfig:
    """Read the configuration of a folder (or hub id) and look at its sizes.

    Args:
        what: the part, for messages.
        path: the folder.
        options: of transformers' AutoConfig.

    Raises:
        ValueError: missing or damaged, a size that is none, or an activation nobody knows.
    """
    named = Path(path, options["gguf_file"]) if "gguf_file" in options else path
    with loading(what, named):
        values, _ = PreTrainedConfig.get_config_dict(path, **options)
        check_sizes(values, named)
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **options)
    return config


def check_sections(config: PreTrainedConfig, path: str | Path, *sections: str) -> None:
    """Refuse a model of several parts whose config.json says nothing of one of them.

    transformers would take that part's class as it is by default, with billions of weights.

    Args:
        config: as transformers reads it.
        path: its folder (or hub id).
        sections: that the file must have if the class has them, such as "text_config".

    Raises:
        ValueError: naming the folder and the section.
    """
    kind = type(config)
    values, _ = PreTrainedConfig.get_config_dict(path)
    for name in sections:
        given = values.get(name), values.get(f"{name}_dict")  # the second in CLIP's oldest files
        if name not in kind.sub_configs or any(isinstance(one, Mapping) for one in given):
            continue
        if name == "text_config" and kind.model_type in _FLAT and "hidden_size" in values:
            continue
        raise ValueError(
            f"{path}: config.json has no {name}, which says what the model's "
            f"{name.removesuffix('_config')} part is; {_ANOTHER}"
        )


def check_sizes(values: Mapping[str, Any], path: str | Path, above: str = "") -> None:
    """Refuse sizes of a config.json that no model has, those of the parts inside included.

    Args:
        values: what the file holds.
        path: the folder.
        above: the names of the sections that these values are in, each with a dot.

    Raises:
        ValueError: naming the folder, the field and its value.
    """
    where = f"{path}: config.json has {above}"
    for name, value in values.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            check_sizes(value, path, f"{above}{name}.")
        elif name in _ABOVE_ZERO and any(map(_is_no_size, _each(value))):
            raise ValueError(f"{where}{name} {value}, which must be above 0; {_ANOTHER}")
        elif name in _ACTIVATIONS and isinstance(value, str) and value not in ACT2FN:
            near = closest(value, ACT2FN)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise ValueError(
                f"{where}{name} {value!r}, an activation that transformers does not have{hint}; "
                f"{_ANOTHER}"
            )
    heads_differ = any("head_dim" in name for name, value in values.items() if value is not None)
    for whole, among in _HEADS:
        size, heads = values.get(whole), values.get(among)
        if (heads_differ and "heads" not in whole) or type(size) is not int:
            continue
        if (whole, among) == ("hidden_size", "num_heads") and "embed_dim" in values:
            continue
        if type(heads) is int and size % heads:
            raise ValueError(
                f"{where}{whole} {size}, which is not a multiple of {among} ({heads}); {_ANOTHER}"
            )


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_no_size(value: Any) -> bool:
    return isinstance(value, int | float) and value <= 0


@contextmanager
def building(what: str, path: str | Path) -> Iterator[None]:
    """Turn what a library raises while it builds a model from `path`'s configuration into a line.

    Raises:
        ValueError: naming the part, the folder and the library's reason.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"it does not know {error}" if isinstance(error, KeyError) else first
    except ValueError as error:
        reason = str(error).splitlines()[0]
    else:
        return
    raise ValueError(
        f"{what} {path}: transformers builds no model from its config.json: {reason}; {_ANOTHER}"
    )


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, rows: int | None = None
) -> None:
    """Refuse a tokenizer that knows no words, or one of another model.

    Where files are missing transformers makes an empty tokenizer of the model's kind.

    Args:
        tokenizer: the folder's.
        path: the folder.
        rows: of the embedding; more ids are fine if they are special tokens, which are given rows.

    Raises:
        ValueError: naming the folder and the files, or both figures.
    """
    ids: list[list[int]] = tokenizer(list(_WORDS), add_special_tokens=False)["input_ids"]
    if {token for one in ids for token in one} <= {tokenizer.unk_token_id}:
        raise ValueError(
            f"{path}: the folder has no usable tokenizer (a letter such as {_WORDS[0]!r} has no "
            "ids); copy the checkpoint's tokenizer.json and tokenizer_config.json (or its "
            "tokenizer.model, or vocab.json and merges.txt) into it"
        )
    if rows is None:
        return
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    if beyond := {number for number in tokenizer.get_vocab().values() if number >= rows} - special:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {max(beyond)}, the embedding has {rows} rows "
            f"({len(beyond)} words without one); take tokenizer and weights from one checkpoint"
        )


def check_template(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Refuse a chat template that writes no conversation at all; having none is no mistake.

    One among several, other than the default, may need what is not given here.

    Raises:
        ValueError: with the template's name, and its line or what it fails with.
    """
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    for name, template in templates.items():
        which = "the chat template" if len(templates) == 1 else f"the chat template {name!r}"
        problem = _template_problem(tokenizer, template, f"{path}: ", which)
        if problem and name == "default":
            raise ValueError(f"{path}: {which} {problem}; copy the checkpoint's own")


def _template_problem(
    tokenizer: PreTrainedTokenizerBase, template: str, where: str, which: str
) -> str:
    """What is wrong with a template that fails on all these conversations, else nothing."""
    user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}
    parts: Any = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    system = {"role": "system", "content": "Be kind"}
    problem = ""
    for turns in ([user], [user, answer], [system, user], [parts], [system, parts]):
        try:
            text: Any = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{where}line {error.lineno} of {which} is no Jinja: {error.message}"
            ) from error
        except Exception as error:  # a template is somebody's program, which may raise anything
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = problem or f"fails on every conversation ({first})"
            continue
        if "Hello" in text:
            return ""
        problem = problem or "writes nothing of what a user says"
    return problem
