"""From our model to a class of transformers that holds a whole model: what every class asks of it,
and the files of a folder. Nothing is written before everything is known to fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mllm.models.composites.folder import check_in_sequence, text_config
from mllm.models.composites.images import image_processor, tiling
from mllm.models.composites.text import written_tokenizer
from mllm.models.errors import read_json
from mllm.models.families import LogitsRule, logits_rule
from mllm.models.geometry import ImageGeometry
from mllm.models.modeling import MultimodalModel
from mllm.models.positions import is_spatial
from mllm.models.processor import Processor

_OF_CROPS = ("crop_size", "do_center_crop")


def check_encoder(model: MultimodalModel, who: str, *names: str) -> None:
    """Refuse an encoder that the class has no place for.

    Raises:
        ValueError: naming it and the ones that fit.
    """
    name = model.config.encoder["name"]
    if name not in names:
        raise ValueError(f"{who} cannot hold the encoder {name}: its own is {' or '.join(names)}")
    if model.encoder.spec.get("class_token"):
        raise ValueError(f"{who} cannot hold class_token: true, which doubles the width of a cell")


def check_connector(model: MultimodalModel, who: str, name: str) -> dict[str, Any]:
    """Return the connector's options.

    Raises:
        ValueError: it is another connector.
    """
    spec: dict[str, Any] = model.config.connector
    if spec["name"] != name:
        raise ValueError(f"{who} cannot hold the connector {spec['name']}: its own is {name}")
    return spec


def check_blocks(model: MultimodalModel, who: str, factor: int) -> None:
    """Refuse a pixel shuffle that pads the encoder's grid.

    Raises:
        ValueError: the factor does not divide the grid's side.
    """
    cells = model.encoder.square.cells
    if cells % factor:
        raise ValueError(
            f"{who} cannot hold the connector's factor {factor}: it does not divide the {cells} "
            "cells of a side, and nothing is padded there"
        )


def check_tiling(model: MultimodalModel, who: str, *tilings: str) -> None:
    """Refuse a way of cutting images that the class's processor does not know.

    Args:
        tilings: those that it knows, "none" for not cutting.

    Raises:
        ValueError: another one, features of regions, or a whole image that is not squashed to the
            square.
    """
    found = tiling(model.config.images, who)
    if found not in tilings:
        raise ValueError(f"{who} cannot hold tiling {found}: it has {' or '.join(tilings)}")
    geometry = model.encoder.square
    if found == "none" and geometry.resize != "squash":
        raise ValueError(
            f"{who} cannot hold resize {geometry.resize}: its processor squashes images"
        )


def check_language_model(model: MultimodalModel, who: str) -> None:
    """Refuse a language model that is more than a body and a linear output layer, or that visual
    tokens reach otherwise than in the sequence.

    Raises:
        ValueError: naming what there is besides.
    """
    ours: Any = model.config
    check_in_sequence(ours, who)
    check_positions_and_width(model, who)
    language_model: Any = model.language_model
    name, config = type(language_model).__name__, model.config.text_config
    head, body = language_model.get_output_embeddings(), language_model.base_model
    extra = {id(weight) for weight in language_model.parameters()}
    extra -= {id(weight) for module in (body, head) for weight in module.parameters()}
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{who} cannot hold {name}: its output layer has a bias")
    if extra or not isinstance(head, nn.Linear):
        raise ValueError(f"{who} cannot hold {name}: its output layer is more than a linear layer")
    if logits_rule(config) != LogitsRule():
        raise ValueError(
            f"{who} cannot hold {name}: it scales or caps its logits, which {who} does not"
        )


def check_positions_and_width(model: MultimodalModel, who: str) -> None:
    """Refuse a language model that visual tokens cannot go into as plain embeddings in a row.

    Raises:
        ValueError: its positions have three directions, or its embedding is of another width than
            its layers.
    """
    embedding, config = model.get_input_embeddings(), model.config.text_config
    name = type(model.language_model).__name__
    if is_spatial(config):
        raise ValueError(
            f"{who} cannot hold {name}: its positions have three directions, those of {who} one"
        )
    width = int(embedding.embedding_dim)  # type: ignore[arg-type]
    if width != config.hidden_size:
        raise ValueError(
            f"{who} cannot hold {name}: its embedding is {width} wide and its layers "
            f"{config.hidden_size}"
        )


def around_image(processor: Processor, who: str) -> tuple[str, str]:
    """Return the texts before and after the tokens of an image.

    Raises:
        ValueError: the chat template's image is not the image token alone.
    """
    text = processor.template.image_text
    check_begin(processor, who)
    if text.asked != processor.image_token:
        raise ValueError(
            f"{who} cannot hold a chat template that writes {text.asked!r} for an image: it looks "
            f"for the image token {processor.image_token!r}"
        )
    before, after = text.written.split(processor.image_token)
    return before, after


def check_begin(processor: Processor, who: str) -> None:
    """Refuse images that stand before the begin token of a raw document.

    Raises:
        ValueError: they do.
    """
    if processor.template.image_text.before_begin:
        raise ValueError(
            f"{who} cannot hold images before the begin token: its processor keeps texts as written"
        )


def embedding_is_output(model: MultimodalModel) -> bool:
    """Return whether the output layer is the embedding, and the classes here can say so.

    They name the embedding `embed_tokens`; of a family that names it otherwise both are written.
    """
    language_model: Any = model.language_model
    same = language_model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return same and "embed_tokens.weight" in language_model.base_model.state_dict()


def text_values(model: MultimodalModel) -> dict[str, Any]:
    """Return the language model's configuration for a class's config.json."""
    return {**text_config(model), "tie_word_embeddings": embedding_is_output(model)}


def vision_values(model: MultimodalModel) -> dict[str, Any]:
    """Return the tower's configuration for a class's config.json."""
    vision: Any = model.encoder.vision
    values: dict[str, Any] = vision.config.to_dict()
    return {name: value for name, value in values.items() if name != "dtype"}


def write_processor(
    processor: Processor,
    names: Mapping[str, str],
    kind: str,
    preprocessor: Mapping[str, Any],
    folder: Path,
    **values: Any,
) -> None:
    """Write the tokenizer's files, preprocessor_config.json and processor_config.json.

    Args:
        names: tokens that the processor looks up in the tokenizer, by their names.
        kind: name of their processor's class.
        preprocessor: of images.
        values: of the processor.
    """
    tokenizer = written_tokenizer(processor.tokenizer)
    tokenizer.save_pretrained(str(folder))
    if any(getattr(tokenizer, name, None) != text for name, text in names.items()):
        file = folder / "tokenizer_config.json"
        found = read_json(file)
        if not isinstance(found.get("extra_special_tokens"), list):
            found["extra_special_tokens"] = dict(names)  # read by transformers 4
        write_json(file, {**found, **names})
    write_json(folder / "preprocessor_config.json", {**preprocessor, "processor_class": kind})
    write_json(folder / "processor_config.json", {**values, "processor_class": kind})


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pixels_of(geometry: ImageGeometry, who: str) -> dict[str, Any]:
    """Return what a preprocessor file says of a square that images, or tiles, are squashed to."""
    values = image_processor(replace(geometry, resize="squash", short_edge=0), who)
    return {name: value for name, value in values.items() if name not in _OF_CROPS}


def tokens_of_view(model: MultimodalModel) -> int:
    """Return the visual tokens of one square view."""
    encoder, connector = model.encoder, model.connector
    tokens: int = connector.tokens_per_image(encoder.grid(*encoder.geometry.smallest))
    return tokens
