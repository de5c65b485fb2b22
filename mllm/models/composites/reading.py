"""From a class of transformers that holds a whole model to its parts, in the order of their names:
their configuration, their weights, their tokenizer, and our model of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

import mllm.models.auto  # noqa: F401  (the Auto classes know our model from here on)
from mllm.models.config import MultimodalConfig
from mllm.models.encoders import ENCODERS
from mllm.models.encoders.preprocessor import read_file
from mllm.models.errors import check_folder, loading
from mllm.models.families import blueprint, check_config, check_model
from mllm.models.language import generation_config
from mllm.models.modeling import MultimodalModel
from mllm.models.probe import probe
from mllm.models.processor import Processor
from mllm.models.template import ImageText
from mllm.models.tiles import special_tokens

Config = TypeVar("Config", bound=PreTrainedConfig)
Weights = Mapping[str, Tensor]


def read_config(path: str | Path, kind: type[Config]) -> Config:
    """Read config.json, and refuse a language model that cannot be packed before any weight.

    Raises:
        ValueError: another class's folder, a damaged file, or such a language model.
    """
    check_folder(path, "model")
    with loading("model", path):
        config = AutoConfig.from_pretrained(path)
    if type(config) is not kind:
        raise ValueError(f"{path} holds a {config.model_type!r} model, not {kind.model_type!r}")
    text = config.get_text_config()
    check_config(text)
    check_model(blueprint(text))
    return config


def read_model(path: str | Path, kind: type[PreTrainedModel], dtype: torch.dtype | str) -> Any:
    """Load their model with its weights.

    Raises:
        ValueError: weights missing, damaged, or of another shape.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with loading("model", path):
            model, report = kind.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(level)
    for problem in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        if names := sorted(map(str, report[problem])):
            raise ValueError(
                f"{path}: the weights do not fit config.json "
                f"({len(names)} {problem.replace('_', ' ')}, {names[0]} first)"
            )
    return model


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the chat template that its processor uses.

    Raises:
        ValueError: missing or damaged.
    """
    with loading("tokenizer", path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    legacy = Path(path) / "chat_template.json"  # of the processor, before it became a jinja file
    if legacy.is_file() and not (Path(path) / "chat_template.jinja").is_file():
        tokenizer.chat_template = read_file(path, legacy.name)["chat_template"]
    return tokenizer


def special_text(tokenizer: PreTrainedTokenizerBase, name: str, path: str | Path) -> str:
    """Return a special token that a processor looks up by name.

    Raises:
        ValueError: the tokenizer does not name it.
    """
    text = getattr(tokenizer, name, None)
    if not isinstance(text, str):
        raise ValueError(
            f"{path}: the tokenizer names no {name}; it stands under extra_special_tokens of the "
            "checkpoint's own tokenizer_config.json"
        )
    return text


@dataclass(frozen=True, slots=True)
class Whole:
    """The parts of their model.

    Attributes:
        origin: what it is called here (a key of COMPOSITES).
        vision: the tower; layers that the encoder's spec leaves out may be there.
        body: the language model without its output layer, head: the output layer.
        connector: weights by the names that they have here.
        generation: their model's generation config.
        image_id: the id of the image token in their configuration.
    """

    origin: str
    vision: nn.Module
    body: Any
    head: nn.Module
    connector: Weights
    generation: Any
    image_id: int


@dataclass(frozen=True, slots=True)
class Looks:
    """How a document becomes ids and views: the arguments of `Processor`, and the encoder's name.

    Attributes:
        encoder: its name and spec.
        connector: its name and options.
        images: the `images:` section.
        image_token: the placeholder of one visual token.
        image_text: what is written for an image.
    """

    encoder: dict[str, Any]
    connector: dict[str, Any]
    images: dict[str, Any]
    image_token: str
    image_text: ImageText


def join(
    whole: Whole, tokenizer: PreTrainedTokenizerBase, looks: Looks, **settings: Any
) -> tuple[MultimodalModel, Processor]:
    """Put their parts together anew: the weights are theirs, not copies.

    Args:
        settings: of `MultimodalConfig` besides.

    Returns:
        The model in eval mode and its processor.

    Raises:
        ValueError: parts that do not fit, or a language model that cannot be packed.
    """
    language_model = _causal(whole)
    rows = language_model.get_input_embeddings().num_embeddings
    encoder = ENCODERS[looks.encoder["name"]](looks.encoder)
    encoder.to(language_model.dtype)
    assign(encoder.vision, whole.vision.state_dict())
    processor = Processor(
        tokenizer,
        encoder.geometry,
        looks.connector,
        looks.image_token,
        looks.images,
        looks.image_text,
    )
    if processor.image_token_id != whole.image_id:
        raise ValueError(
            f"{whole.origin}: image_token_id is {whole.image_id} in config.json, but the "
            f"tokenizer's {looks.image_token!r} has the id {processor.image_token_id}"
        )
    if processor.image_token_id >= rows:
        raise ValueError(
            f"{whole.origin}: the image token has the id {processor.image_token_id}, but the "
            f"embedding has {rows} rows"
        )
    config = MultimodalConfig(
        encoder=looks.encoder,
        connector=looks.connector,
        images=looks.images,
        text_config=language_model.config,
        image_token=looks.image_token,
        image_token_id=processor.image_token_id,
        origin=whole.origin,
        dtype=language_model.dtype,
        **settings,
    )
    model = MultimodalModel(config, encoder=encoder, language_model=language_model)
    probe(language_model)
    model.connector.to(language_model.dtype)
    assign(model.connector, whole.connector)
    never = {*_around_images(processor), *range(len(tokenizer), rows)}
    model.generation_config = generation_config(language_model, tokenizer, sorted(never))
    return model.eval(), processor


def assign(module: nn.Module, weights: Weights) -> None:
    """Make these tensors the weights of a module, which takes what it has a name for.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    wrong = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    for problem, names in (("missing", missing), ("of another shape", wrong)):
        if names:
            raise ValueError(
                f"{type(module).__name__}: {len(names)} weights are {problem}, {names[0]} first"
            )
    module.load_state_dict({name: weights[name] for name in own}, assign=True)


def _causal(whole: Whole) -> Any:
    """Their language model as the causal language model of its family."""
    config = whole.body.config
    embedding = whole.body.get_input_embeddings()
    tied = getattr(whole.head, "weight", None) is embedding.weight
    config.tie_word_embeddings = tied
    model: Any = blueprint(config)
    model.config = config
    setattr(model, model.base_model_prefix, whole.body)
    model.set_output_embeddings(whole.head)
    bare = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if bare:
        raise ValueError(
            f"{whole.origin}: {type(model).__name__} has {bare[0]}, which {whole.origin} does not "
            "hold; this language model cannot be read from it"
        )
    model.generation_config = copy.deepcopy(whole.generation)
    return model


def _around_images(processor: Processor) -> set[int]:
    """Ids of special tokens that stand for images and around them: nothing to generate."""
    template, tokenizer = processor.template, processor.tokenizer
    texts = [template.image_text.written, *special_tokens(processor.images)]
    ids = {token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids}
    return {token for token in ids if template.is_special(token)}
