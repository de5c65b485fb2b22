"""From a recipe's model section to a model and its processor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mllm.models.auto  # noqa: F401  (the Auto classes know the model from here on)
from mllm.models.checks import check_sections, read_config
from mllm.models.composites import COMPOSITES, UNREADABLE
from mllm.models.config import MultimodalConfig
from mllm.models.connectors import CONNECTORS, PretrainedConnector
from mllm.models.encoders import ENCODERS, WITHOUT_PATH
from mllm.models.errors import check_options, choose, loading
from mllm.models.fusion import DEFAULT, fusion_class, needed_tokens
from mllm.models.fusion import check_images as check_fusion
from mllm.models.hub import local_folder
from mllm.models.language import (
    add_special_tokens,
    generation_config,
    load_language_model,
    own_dtype,
)
from mllm.models.modeling import MultimodalModel
from mllm.models.native import LIMITS, bounded
from mllm.models.processor import IMAGE_TOKEN, Processor, changed_connector
from mllm.models.tiles import changed_images, check_images

_TRAINING_OPTIONS = ("init",)  # of a connector's section, but not the model's concern


def assemble(
    section: Any, dtype: torch.dtype | str = torch.float32, weights: bool = True
) -> tuple[MultimodalModel, Processor]:
    """Build the model of a recipe and its processor, on the CPU.

    Args:
        section: the `model:` section, as a mapping or an object with `model_dump`: either `from`
            (a stage's folder; `connector` may change reloadable options) or `encoder` {name, path,
            …}, `connector` {name, …}, `language_model` {path} and maybe `fusion` {name, …}; either
            way `images` {tiling, …}.
        dtype: of all weights; "auto" keeps the saved one, of parts the language model's.
        weights: False reads none and builds everything on the meta device, to be looked at.

    Returns:
        The model in eval mode and its processor.

    Raises:
        ValueError: unknown part or option, a folder that cannot be used, parts that do not fit.
    """
    parts = _as_mapping(section)
    connector = {
        key: value
        for key, value in (parts.get("connector") or {}).items()
        if key not in _TRAINING_OPTIONS
    }
    if start := parts.get("from", parts.get("from_")):
        bounds = {key: value for key, value in (parts.get("encoder") or {}).items() if value}
        for name in ("encoder", "language_model", "fusion"):
            if set(bounds) - set(LIMITS) if name == "encoder" else parts.get(name):
                raise ValueError(f"model.from takes the {name} from {start}; leave {name} out")
        return load(start, dtype, connector, parts.get("images"), weights, bounds)
    for name in ("encoder", "connector", "language_model"):
        if not parts.get(name):
            raise ValueError(f"model.{name} is missing (or give model.from, a trained folder)")
    for name, key in (("encoder", "name"), ("encoder", "path"), ("connector", "name")):
        if key == "path" and parts[name]["name"] in WITHOUT_PATH:
            continue
        if not parts[name].get(key):
            raise ValueError(f"model.{name}.{key} is missing")
    return _from_parts(
        dict(parts["encoder"]),
        connector,
        dict(parts["language_model"]),
        dict(parts.get("images") or {}),
        _fusion(parts.get("fusion") or {}),
        dtype,
        weights,
    )


def load(
    folder: str | Path,
    dtype: torch.dtype | str = "auto",
    connector: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    weights: bool = True,
    encoder: Mapping[str, Any] | None = None,
) -> tuple[MultimodalModel, Processor]:
    """Load a stage's folder, or begin from one of a class of transformers (`COMPOSITES`).

    Args:
        folder: what a stage saved, or such a class, as a folder or as a hub's `owner/name`.
        dtype: of all weights; "auto" keeps the saved one.
        connector: reloadable options to change, e.g. {"visual_tokens": 144}.
        images: options of the tiling to change, e.g. {"tiles": 6}.
        weights: as for `assemble`.
        encoder: bounds of images of native resolution to change, e.g. {"max_pixels": 200704}.

    Returns:
        The model in eval mode and its processor.

    Raises:
        ValueError: not such a folder, damaged files, or an option that cannot change.
    """
    folder = local_folder(folder, "model")
    config = read_config("model", folder)
    changes = dict(connector or {})
    if isinstance(config, MultimodalConfig):
        model, processor = _saved(folder, config, dtype, changes, weights)
    elif config.model_type in COMPOSITES:
        check_sections(config, folder, "text_config", "vision_config")
        model, processor = COMPOSITES[config.model_type].read(folder, dtype, weights)
        changed_connector(model.config.connector, changes)  # theirs have no reloadable options
    elif config.model_type in UNREADABLE:
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model: {UNREADABLE[config.model_type]}"
        )
    else:
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model, neither one that was assembled here "
            f"nor one to begin from ({', '.join(COMPOSITES)}): give it as language_model or encoder"
        )
    if encoder:
        processor = _bounded_anew(model, processor, encoder)
    if images:
        processor = _cut_anew(model, processor, images)
    return model, processor


def _bounded_anew(
    model: MultimodalModel, processor: Processor, limits: Mapping[str, Any]
) -> Processor:
    """Change the bounds of images of native resolution."""
    geometry = model.encoder.geometry = bounded(model.encoder.geometry, limits)
    model.encoder.spec["geometry"] = geometry.to_dict()
    model.config.encoder = {**model.config.encoder, "geometry": geometry.to_dict()}
    return processor.seeing(geometry)


def _saved(
    folder: str | Path,
    config: MultimodalConfig,
    dtype: torch.dtype | str,
    changes: dict[str, Any],
    weights: bool,
) -> tuple[MultimodalModel, Processor]:
    """Load what a stage saved; arguments as `load`."""
    config.connector = changed_connector(config.connector, changes)
    with loading("processor", folder):
        processor = Processor.from_pretrained(folder, connector=changes)
    _check_agreement(config, processor, folder)
    model: MultimodalModel
    if weights:
        model = MultimodalModel.from_pretrained(folder, config=config, dtype=dtype)
    else:
        with torch.device("meta"):
            model = MultimodalModel(config).eval()
        saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        nn.Module.to(model, dtype=dtype if isinstance(dtype, torch.dtype) else saved)
    return model, processor


def _check_agreement(config: MultimodalConfig, processor: Processor, folder: str | Path) -> None:
    """Refuse a processor and a model that would count an image's tokens differently.

    Raises:
        ValueError: naming what they disagree on.
    """
    ours = (config.connector, config.encoder.get("geometry") or {}, config.images)
    theirs = (processor.connector, processor.geometry.to_dict(), processor.images)
    for name, one, other in zip(("connector", "geometry", "images"), ours, theirs, strict=True):
        for key in sorted(one.keys() | other.keys()):
            # as JSON, which knows no tuples
            if json.dumps(one.get(key)) != json.dumps(other.get(key)):
                raise ValueError(
                    f"{folder}: config.json says {name}.{key} {one.get(key)!r}, but "
                    f"processor_config.json {other.get(key)!r}; take both files from one stage"
                )


def _cut_anew(
    model: MultimodalModel, processor: Processor, changes: Mapping[str, Any]
) -> Processor:
    """Change how images are cut; tokens of marks and a newline are added where they are missing."""
    images = changed_images(processor.images, changes)
    check_images(images)
    language_model: Any = model.language_model
    needed = needed_tokens(processor.fusion, images)
    never = add_special_tokens(language_model, processor.tokenizer, needed)
    model.config.text_config = language_model.config
    model.cut_images(images)
    config: Any = model.generation_config
    config.suppress_tokens = sorted({*never, *(config.suppress_tokens or [])})
    return processor.cutting(images)


def _from_parts(
    encoder_section: dict[str, Any],
    connector: dict[str, Any],
    language_section: dict[str, Any],
    images: dict[str, Any],
    fusion: dict[str, Any],
    dtype: torch.dtype | str,
    weights: bool,
) -> tuple[MultimodalModel, Processor]:
    name = encoder_section.pop("name")
    encoder_class = choose(ENCODERS, name, "encoder")
    connector_class = choose(CONNECTORS, connector["name"], "connector")
    options = {key: value for key, value in encoder_section.items() if value is not None}
    connector = {key: value for key, value in connector.items() if value is not None}
    connector_class.check(connector)
    check_fusion(fusion, images)
    start = connector.get("path")
    if start is not None and issubclass(connector_class, PretrainedConnector):
        connector = connector_class.spec_from_folder(connector)
    language_path = language_section.pop("path")
    check_options(language_section, (), "language_model")
    check_images(images)
    precision = dtype if isinstance(dtype, torch.dtype) else own_dtype(language_path)
    place = contextlib.nullcontext() if weights else torch.device("meta")
    with place:
        build = encoder_class.from_folder if weights else encoder_class.described
        encoder = build(**options).to(precision)
    language_model, tokenizer = load_language_model(language_path, precision, weights)
    needed = (IMAGE_TOKEN, *needed_tokens(fusion, images))
    added = add_special_tokens(language_model, tokenizer, needed)
    processor = Processor(tokenizer, encoder.geometry, connector, images=images, fusion=fusion)
    config = MultimodalConfig(
        encoder={"name": name, **encoder.spec},
        connector=connector,
        fusion=fusion,
        images=images,
        text_config=language_model.config,
        image_token=IMAGE_TOKEN,
        image_token_id=processor.image_token_id,
        dtype=precision,
    )
    with place:
        model = MultimodalModel(config, encoder=encoder, language_model=language_model)
    model.connector.to(precision)
    model.fusion.to(precision)
    if weights and start is not None and isinstance(model.connector, PretrainedConnector):
        model.connector.load_weights(start)
    model.generation_config = generation_config(language_model, processor.template, added)
    return model.eval(), processor


def _fusion(section: Mapping[str, Any]) -> dict[str, Any]:
    """The fusion's spec, checked; empty for the default, as a folder saved before it has it."""
    spec = {name: value for name, value in section.items() if value is not None}
    fusion_class(spec).check(spec)
    return {} if spec.get("name", DEFAULT) == DEFAULT else spec


def _as_mapping(section: Any) -> Mapping[str, Any]:
    if isinstance(section, Mapping):
        return section
    values: Mapping[str, Any] = section.model_dump(by_alias=True, exclude_none=True)
    return values
