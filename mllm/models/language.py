"""A causal language model and its tokenizer: from a folder to parts of a multimodal model.

A mixture-of-experts model is trained with the objectives of the recipe and nothing else: the
auxiliary losses of its router (load balance, z-loss) are no part of the body's forward and are not
added in silence, whatever `output_router_logits` and `router_aux_loss_coef` say. Its experts are
slices of one weight of one module, multiplied in groups. transformers' other way, a loop over the
experts that got a token, calls a module (their activation) as often as the tokens decide, and ranks
with sharded weights would then disagree about what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllm.models import attention
from mllm.models.checks import building, check_template, check_tokenizer, read_config
from mllm.models.errors import check_language_model, loading
from mllm.models.families import blueprint, causal_class, check_config, check_model
from mllm.models.probe import probe
from mllm.models.template import Template
from mllm.models.weight_files import check_all_used, check_shapes, check_weight_files

_ROWS = 64  # the embedding is padded to a multiple: tensor cores want it


def own_dtype(path: str | Path) -> torch.dtype:
    """Return what a language model's weights are in, fp32 where its folder does not say.

    Raises:
        ValueError: the path cannot be used.
    """
    check_language_model(path, "language_model")
    folder, options = _source(path)
    dtype = read_config("language model", folder, **options).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_language_model(
    path: str | Path, dtype: torch.dtype = torch.float32, weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        path: a folder with safetensors, a hub id, or a .gguf file (its blocks are dequantised, and
            its tokenizer and chat template are used; needs the package gguf).
        dtype: of the weights.
        weights: False builds the model on the meta device and neither reads weights nor runs it.

    Raises:
        ValueError: the path cannot be used, or the model cannot be packed: for what its
            configuration and its modules say, before weights are loaded, or for what they do.
    """
    check_language_model(path, "language_model")
    folder, options = _source(path)
    config = read_config("language model", folder, **options)
    check_config(config)
    with building("language model", path):
        plan = blueprint(config, dtype)
    check_model(plan)
    with loading("language model", path):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    check_tokenizer(tokenizer, path, _rows(plan))
    check_template(tokenizer, path)
    if not weights:
        return plan, tokenizer
    if not options:
        check_weight_files(path, "language model")
        check_shapes(path, plan, "language model")
    with loading("language model", path):
        loaded: Any = causal_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **(options or {"use_safetensors": True}),
        )
    model, report = loaded
    if wrong := sorted(str(key[0]) for key in report["mismatched_keys"]):
        raise ValueError(
            f"{path}: {len(wrong)} weights of the language model have another shape than "
            f"config.json says, {wrong[0]} first; take both files from one checkpoint"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{path}: {len(missing)} weights are missing, {missing[0]} first; take "
            "config.json and weights from one checkpoint"
        )
    check_all_used(report["unexpected_keys"], plan, path, "language model")
    probe(model)
    return model, tokenizer


def _source(path: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """Where transformers looks, and what it is told besides."""
    if str(path).endswith(".gguf"):
        return Path(path).parent, {"gguf_file": Path(path).name}
    return path, {}


def add_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[int]:
    """Add special tokens once; return the rows of the embedding that are nobody's text.

    A tokenizer that has one keeps its id; a plain word becomes special, so that no text may hold
    it.
    """
    tokens = [AddedToken(text, special=True, normalized=False) for text in texts]
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    own = [tokenizer.get_vocab()[text] for text in texts]
    before = _rows(model)
    if len(tokenizer) <= before:
        return sorted(own)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_ROWS, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():
            # the mean's logit is far below any likely token's, a random row's need not be
            weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)
    return sorted({*own, *range(before, _rows(model))})


def generation_config(
    model: PreTrainedModel, template: Template, never: list[int]
) -> GenerationConfig:
    """The language model's own, ending turns, never writing what stands for images."""
    config, tokenizer = model.generation_config or GenerationConfig(), template.tokenizer
    own = config.eos_token_id
    ends = {tokenizer.eos_token_id, template.end_of_turn()}
    ends |= {*(own if isinstance(own, list) else [own])}
    config.eos_token_id = sorted(end for end in ends if end is not None and end >= 0)
    if config.pad_token_id is None or config.pad_token_id < 0:
        pad = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    config.suppress_tokens = sorted({*never, *(config.suppress_tokens or [])})
    return config


def _rows(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)
