"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191) and Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923)
as transformers holds them.

A vision transformer of native resolution, a patch merger, a language model whose positions have
three directions. An image stands in the text as `<|vision_start|>`, its tokens and
`<|vision_end|>`. Videos are separate images here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from mllm.models.composites import writing
from mllm.models.composites.base import Composite
from mllm.models.composites.reading import (
    Looks,
    Whole,
    join,
    read_config,
    read_model,
    read_tokenizer,
)
from mllm.models.connectors.patch_merger import PatchMerger
from mllm.models.encoders import ENCODERS
from mllm.models.modeling import MultimodalModel
from mllm.models.native import NativeGeometry
from mllm.models.processor import Processor
from mllm.models.template import ImageText

_IMAGE, _VIDEO = "<|image_pad|>", "<|video_pad|>"
_START, _END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True, slots=True)
class _Kind:
    """What sets one of the classes apart.

    Attributes:
        name: of the class, and of the encoder here.
        config, model: theirs.
        processor: name of their processor's class.
        norm: of the merger.
        width: what the vision configuration calls the language model's width.
        merger: names of the merger's modules, ours and theirs.
    """

    name: str
    config: type[Any]
    model: type[PreTrainedModel]
    processor: str
    norm: str
    width: str
    merger: Mapping[str, str]


_LINEAR = {"norm": "ln_q", "first": "mlp.0", "second": "mlp.2"}
_QWEN2 = _Kind(
    "qwen2_vl",
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    "Qwen2VLProcessor",
    "layer",
    "hidden_size",
    _LINEAR,
)
_QWEN2_5 = _Kind(
    "qwen2_5_vl",
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    "Qwen2_5_VLProcessor",
    "rms",
    "out_hidden_size",
    _LINEAR,
)


def _read(
    kind: _Kind, path: str | Path, dtype: torch.dtype | str
) -> tuple[MultimodalModel, Processor]:
    """Read their folder; see `Composite`."""
    config: Any = read_config(path, kind.config)
    spec = ENCODERS[kind.name].spec_from_folder(path)
    tokenizer = read_tokenizer(path)
    token, text = _image_text(config, tokenizer, path)
    looks = Looks(
        encoder={"name": kind.name, **spec},
        connector={
            "name": "patch_merger",
            "factor": config.vision_config.spatial_merge_size,
            "norm": kind.norm,
        },
        images={},
        image_token=token,
        image_text=ImageText(text, text),
    )
    theirs: Any = read_model(path, kind.model, dtype)
    whole = Whole(
        origin=kind.name,
        vision=theirs.model.visual,
        body=theirs.model.language_model,
        head=theirs.lm_head,
        connector={
            f"merger.{ours}.{name}": weight
            for ours, own in kind.merger.items()
            for name, weight in theirs.model.visual.merger.get_submodule(own).state_dict().items()
        },
        generation=theirs.generation_config,
        image_id=config.image_token_id,
    )
    return join(whole, tokenizer, looks)


def _write(kind: _Kind, model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """Write the folder of their class; see `Composite`."""
    _check(kind, model)
    tokens = _token_ids(kind, processor)
    tensors, tied = writing.text_tensors(model, "model.language_model.")
    vision: Any = model.encoder.vision
    tensors |= {f"model.visual.{name}": one for name, one in vision.state_dict().items()}
    tensors |= _merger(kind, model.connector.state_dict())
    towers = copy.deepcopy(vision.config)
    towers._attn_implementation = None
    setattr(towers, kind.width, model.connector.last_linear().out_features)
    config = kind.config(
        vision_config=towers,
        text_config=writing.text_config(model, tied),
        tie_word_embeddings=tied,
        **tokens,
    )
    writing.write_model(kind.model, config, tensors, model, folder)
    geometry = model.encoder.geometry
    assert isinstance(geometry, NativeGeometry)
    seen = {
        **writing.pixels_of(geometry),
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": geometry.patch,
        "merge_size": geometry.merge,
        "temporal_patch_size": vision.config.temporal_patch_size,
        "size": {"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels},
    }
    writing.write_processor(processor.tokenizer, {}, kind.processor, seen, folder)


def _image_text(
    config: Any, tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> tuple[str, str]:
    """Return the image token and what is written for an image.

    Raises:
        ValueError: the tokenizer has no such tokens.
    """
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
    texts: list[Any] = [tokenizer.convert_ids_to_tokens(getattr(config, name)) for name in names]
    for name, text in zip(names, texts, strict=True):
        if text is None:
            raise ValueError(
                f"{path}: config.json has {name} {getattr(config, name)}, which the tokenizer does "
                "not have; take both files from one checkpoint"
            )
    return texts[1], "".join(texts)


def _token_ids(kind: _Kind, processor: Processor) -> dict[str, int]:
    """Return the ids of special tokens by the names that they have in their configuration.

    Raises:
        ValueError: an image is written in another way.
    """
    written = processor.template.image_text.written
    if written != f"{_START}{_IMAGE}{_END}":
        raise ValueError(
            f"{kind.name} cannot hold the text of an image {written!r}: its processor looks for "
            f"{_IMAGE!r} between {_START!r} and {_END!r}"
        )
    known = processor.tokenizer.get_vocab()
    names = {
        "image_token_id": _IMAGE,
        "video_token_id": _VIDEO,
        "vision_start_token_id": _START,
        "vision_end_token_id": _END,
    }
    return {name: known[text] for name, text in names.items() if text in known}


def _merger(kind: _Kind, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The connector's weights by their names."""
    pairs = ((name.split(".", 2), weight) for name, weight in weights.items())
    return {
        f"model.visual.merger.{kind.merger[module]}.{rest}": weight
        for (_, module, rest), weight in pairs
    }


def _check(kind: _Kind, model: MultimodalModel) -> None:
    """Refuse what the class cannot hold.

    Raises:
        ValueError: naming the part and the reason.
    """
    name = kind.name
    writing.check_encoder(model, name, name)
    if model.encoder.spec["layer"] != -1:
        raise ValueError(
            f"{name} cannot hold the encoder's layer {model.encoder.spec['layer']}: it takes the "
            "last"
        )
    spec = writing.check_connector(model, name, "patch_merger")
    connector, merge = model.connector, model.encoder.geometry.merge  # type: ignore[attr-defined]
    assert isinstance(connector, PatchMerger)
    for option, found, fits in (
        ("factor", connector.factor, merge),
        ("norm", spec.get("norm") or "layer", kind.norm),
        ("norm_after", connector.norm_after, False),
    ):
        if found != fits:
            raise ValueError(
                f"{name} cannot hold the connector's {option} {found}: it is {fits} there"
            )
    first = connector.merger.first
    wide = first.in_features
    if first.out_features != wide:
        raise ValueError(
            f"{name} cannot hold the connector's hidden {spec['hidden']}: it is {wide} there"
        )
    text, fitting = model.config.text_config.model_type, kind.config.sub_configs["text_config"]
    if text != fitting.model_type:
        raise ValueError(
            f"{name} cannot hold the language model {text}: its own is {fitting.model_type}"
        )
    writing.check_language_model(model, name)


def _composite(kind: _Kind) -> Composite:
    return Composite(kind.name, partial(_read, kind), partial(_write, kind))


QWEN2_VL = _composite(_QWEN2)
QWEN2_5_VL = _composite(_QWEN2_5)
