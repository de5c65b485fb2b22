"""Reading and writing folders of transformers' own classes: weights by their names, and the text.

A class's folder is read and written by the class itself, so that sharded files, older names of
weights and whatever else it knows about its folders are its business. What is done here is giving
the weights other names: `Names` is a table (beginning of our name, beginning of theirs).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mllm.models.checks import read_config
from mllm.models.config import MultimodalConfig
from mllm.models.errors import loading
from mllm.models.families import LogitsRule, blueprint, check_config, check_model, logits_rule
from mllm.models.language import generation_config
from mllm.models.modeling import MultimodalModel
from mllm.models.probe import probe
from mllm.models.processor import Processor
from mllm.models.tiles import special_tokens
from mllm.models.weight_files import check_all_used, check_shapes, check_weight_files

Names = Sequence[tuple[str, str]]

_NORMS = (".post_layernorm.weight", ".post_layernorm.bias")
"""What a class builds after the last layer of an encoder, and reads nothing from."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a class's folder holds.

    Attributes:
        weights: by their names; on the meta device where they were not read.
        tied: whether the output layer is the embedding, whatever a configuration says.
        generation: their settings of generation.
    """

    weights: dict[str, Tensor]
    tied: bool
    generation: GenerationConfig | None

    @classmethod
    def of(cls, model: Any) -> Saved:
        """Take a model of the class apart."""
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        return cls(model.state_dict(), head.weight is embedding.weight, model.generation_config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(iter(self.weights.values())).dtype

    @property
    def blank(self) -> bool:
        """Whether there are no numbers in the weights."""
        return any(tensor.is_meta for tensor in self.weights.values())


def read_weights(
    path: str | Path, kind: type[PreTrainedModel], dtype: torch.dtype | str, weights: bool = True
) -> Saved:
    """Load a class's folder (or hub id).

    Args:
        path: the folder.
        kind: the class.
        dtype: of the weights; "auto" keeps the saved one.
        weights: False opens no file of weights and goes by config.json.

    Raises:
        ValueError: files that are missing or damaged, weights that are missing or of another shape.
    """
    if not weights:
        return Saved.of(_described(path, kind, dtype))
    check_weight_files(path, "model")
    check_shapes(path, _described(path, kind, dtype), kind.__name__)
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with loading("model", path):
            loaded: Any = kind.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(level)
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(_told, report[problem])):
            raise ValueError(
                f"{path}: {len(names)} weights of {kind.__name__} are "
                f"{problem.removesuffix('_keys')}, {names[0]} first; take config.json and weights "
                "from one checkpoint"
            )
    check_all_used(report["unexpected_keys"], model, path, kind.__name__)
    return Saved.of(model)


def _told(key: Any) -> str:
    """A weight that transformers reports: its name, or with both shapes where they differ."""
    if isinstance(key, str):
        return key
    name, saved, described = key
    return f"{name} ({list(saved)} in the file, {list(described)} by config.json)"


def _described(
    path: str | Path, kind: type[PreTrainedModel], dtype: torch.dtype | str
) -> PreTrainedModel:
    """Build a class's model on the meta device, as its config.json says."""
    config: Any = read_config("model", path)
    with loading("model", path), torch.device("meta"):
        model: Any = kind(config)
    nn.Module.to(model, dtype=next(filter(_is_dtype, (dtype, config.dtype)), torch.float32))
    with suppress(OSError):  # not every folder has one: the class goes by config.json then
        model.generation_config = GenerationConfig.from_pretrained(path)
    result: PreTrainedModel = model
    return result


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


def check_language(text: PreTrainedConfig, path: str | Path) -> None:
    """Refuse a language model that cannot be packed, before weights are loaded.

    Raises:
        ValueError: naming the folder, the family and the reason.
    """
    try:
        check_config(text)
        check_model(blueprint(text))
    except ValueError as error:
        raise ValueError(f"{path}: its language model cannot be used here: {error}") from error


def build(
    config: MultimodalConfig,
    processor: Processor,
    saved: Saved,
    names: Names,
) -> MultimodalModel:
    """Build our model with weights under their names; those that it has no place for are left out.

    Weights that were not read leave the model on the meta device.

    Args:
        config: of our model.
        processor: its tokenizer ends turns.
        saved: weights under their names, and their settings of generation.
        names: the table.

    Raises:
        ValueError: weights that are missing, or a language model that cannot be packed.
    """
    config.dtype = saved.dtype
    model = _blank(config, saved) if saved.blank else _filled(config, saved, names)
    language_model: Any = model.language_model
    language_model.generation_config = saved.generation or language_model.generation_config
    embedding: Any = model.get_input_embeddings()
    never = _around_images(processor)
    never |= {*range(len(processor.tokenizer), embedding.num_embeddings)}
    model.generation_config = generation_config(language_model, processor.template, sorted(never))
    model.eval()
    return model


def _blank(config: MultimodalConfig, saved: Saved) -> MultimodalModel:
    with torch.device("meta"):
        model = MultimodalModel(config)
    nn.Module.to(model, dtype=saved.dtype)
    return model


def _filled(config: MultimodalConfig, saved: Saved, names: Names) -> MultimodalModel:
    with torch.device("meta"):
        wanted = MultimodalModel(copy.deepcopy(config)).state_dict().keys()
    renamed = _renamed(saved.weights, [(their, our) for our, their in names])
    kept = {name: tensor for name, tensor in renamed.items() if name in wanted}
    model: MultimodalModel = MultimodalModel.from_pretrained(
        None, config=config, state_dict=kept, dtype=saved.dtype
    )
    probe(model.language_model)
    return model


def _around_images(processor: Processor) -> set[int]:
    """Ids of special tokens that stand for images and around them: nothing to generate."""
    template, tokenizer = processor.template, processor.tokenizer
    texts = [template.image_text.written, *special_tokens(processor.images)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {token for one in ids for token in one if template.is_special(token)}


def save(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    model: MultimodalModel,
    names: Names,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write our weights under their names, config.json and generation_config.json.

    Args:
        kind: the class.
        config: its configuration.
        model: ours.
        names: the table.
        folder: what to write.
        weights: by our names; left out, the model's as they are.

    Raises:
        ValueError: weights that the class has no place for, or another place.
    """
    config.architectures = [kind.__name__]
    config.dtype = model.dtype
    with torch.device("meta"):
        theirs: Any = kind(config)
    weights = _renamed(model.state_dict() if weights is None else weights, names)
    for name, meta in theirs.state_dict().items():
        if name not in weights and name.endswith(_NORMS):
            weights[name] = torch.full(
                meta.shape, float(name.endswith("weight")), dtype=model.dtype
            )
        if name not in weights or weights[name].shape != meta.shape:
            found = list(weights[name].shape) if name in weights else "none"
            raise ValueError(
                f"{kind.__name__} has a weight {name} of shape {list(meta.shape)}, this model "
                f"{found}"
            )
    if extra := sorted(weights.keys() - theirs.state_dict().keys()):
        raise ValueError(f"{kind.__name__} has no place for {len(extra)} weights, {extra[0]} first")
    theirs.load_state_dict(_apart(weights), assign=True)
    theirs.tie_weights()
    theirs.generation_config = copy.deepcopy(model.generation_config)
    theirs.save_pretrained(folder, save_original_format=False)


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what two names share: a class that does not tie them would write one of the two."""
    result: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in weights.items():
        result[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return result


def body_and_head(
    text: PreTrainedConfig, kind: type[PreTrainedModel], there: str = "model.language_model."
) -> Names:
    """Return the names of a language model in a class that has its body and an `lm_head`.

    Such a class takes the language model without its output layer and puts a plain one on it.

    Raises:
        ValueError: the language model's own is another, or it does something to the logits.
    """
    whole: Any = blueprint(text)
    family = type(whole).__name__
    if logits_rule(text) != LogitsRule():
        raise ValueError(f"{family} scales or caps its logits, which {kind.__name__} does not")
    head = whole.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(f"the output layer of {family} has a bias, that of {kind.__name__} none")
    body = whole.base_model_prefix
    (place,) = (name for name, module in whole.named_modules() if module is head)
    return [
        (f"language_model.{body}.", there),
        (f"language_model.{place}.", "lm_head."),
    ]


def one_layer(layer: int | Sequence[int], path: str | Path) -> int:
    """Return the layer that a `vision_feature_layer` names; a list may name one too.

    Raises:
        ValueError: it names several.
    """
    layers = [layer] if isinstance(layer, int) else list(layer)
    if len(layers) != 1:
        raise ValueError(
            f"{path}: vision_feature_layer {layer}: features of several layers side by side cannot "
            "be read"
        )
    return layers[0]


def check_in_sequence(config: MultimodalConfig, name: str) -> None:
    """Refuse a fusion that reaches into the layers of the language model.

    Args:
        config: of our model.
        name: the class that is written, for messages.

    Raises:
        ValueError: naming the fusion.
    """
    if config.fusion:
        raise ValueError(
            f"{name}: visual tokens stand in its sequence and nowhere else, this model's fusion is "
            f"{config.fusion['name']}"
        )


def text_config(model: MultimodalModel) -> dict[str, Any]:
    """Return the configuration of the language model as a class's config.json holds it."""
    language_model: Any = model.language_model
    values: dict[str, Any] = language_model.config.to_dict()
    return {name: value for name, value in values.items() if name != "dtype"}


def _renamed(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Give weights other names; one that is in no row of the table keeps its own."""
    result = {}
    for name, tensor in weights.items():
        for start, other in names:
            if name.startswith(start):
                result[other + name.removeprefix(start)] = tensor
                break
        else:
            result[name] = tensor
    return result
