"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191), Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923) and
Qwen3-VL (arXiv 2511.21631) as transformers holds them.

A vision transformer of native resolution, a patch merger, a language model whose positions have
three directions. An image stands in the text as `<|vision_start|>`, its tokens and
`<|vision_end|>`. In Qwen3-VL inner layers of the vision transformer have mergers of their own,
whose tokens are added after the first layers of the language model; with a mixture of experts as
language model the class has another name. Videos are separate images here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from mllm.models.checks import read_config
from mllm.models.composites import writing
from mllm.models.composites.base import Composite
from mllm.models.composites.folder import (
    Names,
    body_and_head,
    build,
    check_language,
    read_weights,
    save,
)
from mllm.models.composites.text import read_tokenizer, token_of
from mllm.models.config import MultimodalConfig
from mllm.models.connectors.patch_merger import PatchMerger
from mllm.models.encoders import ENCODERS
from mllm.models.fusion.deepstack import DeepStack
from mllm.models.fusion.in_sequence import InSequence
from mllm.models.geometry import RESAMPLING_NAMES
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
        name: of the class.
        encoder: of its tower here.
        config, model: theirs.
        processor: name of their processor's class.
        norm: of the merger.
        width: what the vision configuration calls the language model's width.
        merger: modules of a merger, ours and theirs.
    """

    name: str
    encoder: str
    config: type[Any]
    model: type[PreTrainedModel]
    processor: str
    norm: str
    width: str
    merger: Mapping[str, str]

    def names(self, text: Any, levels: int) -> Names:
        """Our names and theirs; `text` is the language model's configuration."""
        mergers = [("connector.merger.", "model.visual.merger.")]
        for number in range(levels):
            there = f"model.visual.deepstack_merger_list.{number}."
            mergers.append((f"connector.inner.{number}.", there))
        return [
            *((a + ours, b + own) for a, b in mergers for ours, own in self.merger.items()),
            ("encoder.vision.", "model.visual."),
            *body_and_head(text, self.model),
        ]


_LINEAR = {"norm.": "ln_q.", "first.": "mlp.0.", "second.": "mlp.2."}
_QWEN2 = _Kind(
    "qwen2_vl",
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
    "qwen2_5_vl",
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    "Qwen2_5_VLProcessor",
    "rms",
    "out_hidden_size",
    _LINEAR,
)
_QWEN3 = _Kind(
    "qwen3_vl",
    "qwen3_vl",
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    "Qwen3VLProcessor",
    "layer",
    "out_hidden_size",
    {"norm.": "norm.", "first.": "linear_fc1.", "second.": "linear_fc2."},
)
_QWEN3_MOE = replace(
    _QWEN3,
    name="qwen3_vl_moe",
    config=Qwen3VLMoeConfig,
    model=Qwen3VLMoeForConditionalGeneration,
)


def _read(
    kind: _Kind, path: str | Path, dtype: torch.dtype | str, weights: bool = True
) -> tuple[MultimodalModel, Processor]:
    """From its folder to our model."""
    config: Any = read_config("model", path)
    text = copy.deepcopy(config.text_config)
    check_language(text, path)
    inner = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    spec = ENCODERS[kind.encoder].spec_from_folder(path, **({"deepstack": True} if inner else {}))
    tokenizer, token = read_tokenizer(path, config.image_token_id)
    start, end = (_token(tokenizer, config, name, path) for name in ("start", "end"))
    written = f"{start}{token}{end}"
    connector = {
        "name": "patch_merger",
        "factor": config.vision_config.spatial_merge_size,
        "norm": kind.norm,
        **({"levels": 1 + inner} if inner else {}),
    }
    fusion = {"name": "deepstack", "layers": list(range(inner))} if inner else {}
    geometry = NativeGeometry.from_dict(spec["geometry"])
    image_text = ImageText(written, written)
    processor = Processor(
        tokenizer, geometry, connector, token, image_text=image_text, fusion=fusion
    )
    saved = read_weights(path, kind.model, dtype, weights)
    text.tie_word_embeddings = saved.tied
    ours = MultimodalConfig(
        encoder={"name": kind.encoder, **spec},
        connector=connector,
        fusion=fusion,
        text_config=text,
        image_token=token,
        image_token_id=config.image_token_id,
        origin=kind.name,
    )
    return build(ours, processor, saved, kind.names(text, inner)), processor


def _write(kind: _Kind, model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """From our model to its folder."""
    _check(kind, model)
    tokens = _token_ids(kind, processor)
    text = model.config.text_config
    vision = writing.vision_values(model)
    del vision["model_type"]  # of the tower's class here; with experts it has another name
    config = kind.config(
        vision_config={**vision, kind.width: text.hidden_size},
        text_config=writing.text_values(model),
        tie_word_embeddings=writing.embedding_is_output(model),
        **tokens,
    )
    inner = PatchMerger.number(model.config.connector, "levels") - 1
    save(kind.model, config, model, kind.names(text, inner), folder)
    geometry = model.encoder.geometry
    assert isinstance(geometry, NativeGeometry)
    seen = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(geometry.mean),
        "image_std": list(geometry.std),
        "resample": RESAMPLING_NAMES.index(geometry.resampling),
        "rescale_factor": 1 / 255,
        "patch_size": geometry.patch,
        "merge_size": geometry.merge,
        "temporal_patch_size": vision["temporal_patch_size"],
        "size": {"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels},
    }
    writing.write_processor(processor, {}, kind.processor, seen, folder)


def _token(tokenizer: PreTrainedTokenizerBase, config: Any, name: str, path: str | Path) -> str:
    """Return the token that begins or ends an image.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    number = getattr(config, f"vision_{name}_token_id")
    text = token_of(tokenizer, number)
    if text is None:
        raise ValueError(
            f"{path}: config.json has vision_{name}_token_id {number}, but the tokenizer has "
            f"{len(tokenizer)} tokens; take both files from one checkpoint"
        )
    return text


def _token_ids(kind: _Kind, processor: Processor) -> dict[str, int]:
    """Return the ids of special tokens by the names that they have in their configuration.

    Raises:
        ValueError: an image is written in another way.
    """
    writing.check_begin(processor, kind.name)
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


def _check(kind: _Kind, model: MultimodalModel) -> None:
    """Refuse what the class cannot hold.

    Raises:
        ValueError: naming the part and the reason.
    """
    name = kind.name
    writing.check_encoder(model, name, kind.encoder)
    if (layer := model.encoder.spec["layer"]) != -1:
        raise ValueError(f"{name} cannot hold the encoder's layer {layer}: it takes the last")
    spec = writing.check_connector(model, name, "patch_merger")
    vision = writing.vision_values(model)
    merge = vision["spatial_merge_size"]
    levels = PatchMerger.number(spec, "levels")
    wide = model.encoder.width // levels * merge**2
    inner = vision.get("deepstack_visual_indexes") or []
    for option, found, fits in (
        ("factor", PatchMerger.number(spec, "factor"), merge),
        ("norm", spec.get("norm") or "layer", kind.norm),
        ("norm_after", bool(spec.get("norm_after")), False),
        ("hidden", PatchMerger.number(spec, "hidden", wide), wide),
        ("levels", levels, 1 + len(inner)),
    ):
        if found != fits:
            raise ValueError(
                f"{name} cannot hold the connector's {option} {found}: it is {fits} there"
            )
    text, fitting = model.config.text_config.model_type, kind.config.sub_configs["text_config"]
    if text != fitting.model_type:
        raise ValueError(
            f"{name} cannot hold the language model {text}: its own is {fitting.model_type}"
        )
    places = list(model.fusion.places) if isinstance(model.fusion, DeepStack) else []
    if places != [*range(len(inner))] or not isinstance(model.fusion, DeepStack | InSequence):
        raise ValueError(
            f"{name} cannot hold the fusion {model.config.fusion or 'in_sequence'}: it adds the "
            f"{len(inner)} inner layers of its encoder after its first {len(inner)} layers"
        )
    if model.config.images.get("regions") == "feature":
        raise ValueError(f"{name} cannot hold images.regions: feature: it has none in the text")


def _composite(kind: _Kind) -> Composite:
    return Composite(kind.name, partial(_read, kind), partial(_write, kind))


QWEN2_VL = _composite(_QWEN2)
QWEN2_5_VL = _composite(_QWEN2_5)
QWEN3_VL = _composite(_QWEN3)
QWEN3_VL_MOE = _composite(_QWEN3_MOE)
