"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision: a tower, two linear layers, any language model.

They differ in how an image becomes views. LLaVA (arXiv 2310.03744, section 3) shows one square;
LLaVA-NeXT and LLaVA-OneVision (arXiv 2408.03326, section 3.2) also show tiles, with a learned
newline after each row. OneVision scales the map of more than nine tiles down; that is not done
here, so grids that could become so large are not chosen.

Inner layers of the tower are read before its final normalisation, also the last (transformers'
`vision_feature_layer` counts hidden states). Layers above it are neither kept nor written.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from mllm.models.checks import read_config
from mllm.models.composites import writing
from mllm.models.composites.base import Composite
from mllm.models.composites.folder import (
    Names,
    body_and_head,
    build,
    check_in_sequence,
    check_language,
    one_layer,
    read_weights,
    save,
)
from mllm.models.composites.images import image_processor, tiling
from mllm.models.composites.text import read_tokenizer, written_tokenizer
from mllm.models.config import MultimodalConfig
from mllm.models.encoders import ENCODERS
from mllm.models.encoders.preprocessor import read_preprocessor
from mllm.models.encoders.vit import VisionTransformer
from mllm.models.geometry import ImageGeometry, Size
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.tiles import AnyResolution

_ENCODERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""`model_type` of a tower → our family."""

_PREFIX_TOKENS = {"clip": 1, "siglip": 0}
"""Our family → tokens before those of the patches."""

_MOST_TILES = 9  # the published rule's
_NOT_SCALED = 1.1**2  # so much over the most tiles, OneVision still takes the map as it is


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of the three classes."""

    name: str
    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    tiles: bool
    scales: bool = False


def _read(
    kind: _Kind, path: str | Path, dtype: torch.dtype | str, weights: bool = True
) -> tuple[MultimodalModel, Processor]:
    """From its folder to our model."""
    config: Any = read_config("model", path)
    family, spec = _tower(config, path)
    geometry = ImageGeometry.from_dict(spec["geometry"])
    images = _tiling(kind, config, geometry, path) if kind.tiles else {}
    text = copy.deepcopy(config.text_config)
    check_language(text, path)
    names = _names(text, kind)
    tokenizer, token = read_tokenizer(path, config.image_token_index)
    connector = {"name": "mlp", "norm": False, "bias": config.multimodal_projector_bias}
    processor = Processor(tokenizer, geometry, connector, token, images)
    saved = read_weights(path, kind.model, dtype, weights)
    text.tie_word_embeddings = saved.tied
    ours = MultimodalConfig(
        encoder={"name": family, **spec},
        connector=connector,
        images=images,
        text_config=text,
        image_token=token,
        image_token_id=config.image_token_index,
        origin=kind.name,
    )
    return build(ours, processor, saved, names), processor


def _tower(config: Any, path: str | Path) -> tuple[str, dict[str, Any]]:
    """Our family and the spec of the encoder."""
    tower, layer = config.vision_config, one_layer(config.vision_feature_layer, path)
    if tower.model_type not in _ENCODERS:
        raise ValueError(
            f"{path}: a vision tower of type {tower.model_type!r} cannot be read, only "
            f"{', '.join(_ENCODERS)}"
        )
    family = _ENCODERS[tower.model_type]
    if config.projector_hidden_act != "gelu":
        raise ValueError(
            f"{path}: a projector with {config.projector_hidden_act} cannot be read, only gelu"
        )
    prefix = config.vision_feature_select_strategy == "default"
    if prefix != bool(_PREFIX_TOKENS[family]):
        raise ValueError(
            f"{path}: vision_feature_select_strategy {config.vision_feature_select_strategy!r} "
            + ("cuts off a patch" if prefix else "keeps the class token, which has no place")
        )
    depth = layer if layer >= 0 else tower.num_hidden_layers + 1 + layer
    if not 1 <= depth <= tower.num_hidden_layers:
        raise ValueError(f"{path}: vision_feature_layer {layer}: the tower has no such layer")
    kind: Any = ENCODERS[family]
    assert issubclass(kind, VisionTransformer)
    one_more = kind._read_config(path)
    one_more.num_hidden_layers = depth + 1  # not built, and so nothing is normalised after `depth`
    seen = read_preprocessor(path)
    if "image_grid_pinpoints" in seen:  # then do_pad is about tiles, not about one image
        seen = {key: value for key, value in seen.items() if key != "do_pad"}
    return family, kind.spec_from(one_more, seen, path, layer=-2)


def _tiling(kind: _Kind, config: Any, geometry: ImageGeometry, path: str | Path) -> dict[str, Any]:
    """The `images:` section that cuts as `image_grid_pinpoints` say."""
    side, short_edge = geometry.image_size, geometry.short_edge
    points = config.image_grid_pinpoints
    if short_edge > side:
        raise ValueError(
            f"{path}: the preprocessor file scales tiles to {short_edge} pixels and cuts {side} of "
            "them, which is not done here; make size and crop_size equal"
        )
    pairs = isinstance(points, list | tuple) and all(map(_is_pair, points))
    if not pairs or any(edge % side or edge < side for point in points for edge in point):
        raise ValueError(
            f"{path}: image_grid_pinpoints {points} of config.json are not whole tiles of {side} "
            "pixels, each as [height, width]; copy the checkpoint's own"
        )
    grids = [(high // side, wide // side) for high, wide in points]
    if kind.scales:
        grids = _not_scaled(grids, _most_tiles(config, path), path)
    return {"tiling": "any_resolution", "grids": [list(grid) for grid in grids]}


def _is_pair(point: Any) -> bool:
    sizes = point if isinstance(point, list | tuple) else ()
    return len(sizes) == 2 and all(type(edge) is int for edge in sizes)


def _most_tiles(config: Any, path: str | Path) -> int:
    rule = config.vision_aspect_ratio
    most = rule.removeprefix("anyres_max_")
    if not rule.startswith("anyres_max_") or not most.isdigit():
        raise ValueError(f"{path}: vision_aspect_ratio {rule!r} cannot be read, only anyres_max_N")
    return int(most)


def _not_scaled(grids: list[Size], most: int, path: str | Path) -> list[Size]:
    """Leave out the grids whose map OneVision might scale down."""
    kept = [grid for grid in grids if prod(grid) <= most * _NOT_SCALED]
    if len(kept) < len(grids):
        logging.getLogger(__name__).warning(
            "%s: images are cut into at most %d tiles here; larger grids, whose features the "
            "published rule scales down, are left out",
            path,
            max(map(prod, kept)),
        )
    return kept


def _write(kind: _Kind, model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """From our model to its folder."""
    ours = model.config
    _check(kind, ours, processor)
    writing.check_language_model(model, kind.name)
    family, spec = ours.encoder["name"], ours.encoder
    side = spec["geometry"]["image_size"]
    strategy = "default" if _PREFIX_TOKENS[family] else "full"
    vision = {**spec["config"], **ENCODERS[family].UNUSED}  # type: ignore[attr-defined]
    vision.pop("dtype", None)
    vision["model_type"] = ENCODERS[family].CONFIG.model_type  # type: ignore[attr-defined]
    values: dict[str, Any] = {
        "vision_config": vision,
        "text_config": writing.text_values(model),
        "image_token_index": processor.image_token_id,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": strategy,
        "multimodal_projector_bias": ours.connector.get("bias") is not False,
        "tie_word_embeddings": writing.embedding_is_output(model),
    }
    cells = spec["geometry"]["cells"] ** 2
    if not kind.scales:
        values["image_seq_length"] = cells
    most = _MOST_TILES
    if kind.tiles:
        geometry = processor.geometry
        assert isinstance(geometry, AnyResolution)
        points = [[rows * side, columns * side] for rows, columns in geometry.grids]
        values["image_grid_pinpoints"] = points
        most = max(_MOST_TILES, *map(prod, geometry.grids))  # so that nothing is scaled
    if kind.scales:
        values["vision_aspect_ratio"] = f"anyres_max_{most}"
        values["video_token_index"] = _video_token(processor)
    config: Any = kind.config(**values)
    theirs = _processor(kind, processor, config)
    save(kind.model, config, model, _names(config.text_config, kind), folder)
    theirs.save_pretrained(folder)


def _check(kind: _Kind, ours: Any, processor: Processor) -> None:
    """Refuse what the class cannot hold."""
    check_in_sequence(ours, kind.name)
    family, connector, images = ours.encoder["name"], ours.connector, ours.images
    if family not in _PREFIX_TOKENS:
        raise ValueError(
            f"{kind.name}: the encoder {family} cannot be written, only {', '.join(_PREFIX_TOKENS)}"
        )
    if family == "siglip" and ours.encoder["layer"] == -1:
        raise ValueError(
            f"{kind.name}: it reads the layers of its tower before their final normalisation, "
            "which this model's encoder applies (layer: -1)"
        )
    if connector["name"] != "mlp" or connector.get("norm") is not False:
        has = "a LayerNorm before it" if connector["name"] == "mlp" else connector["name"]
        raise ValueError(
            f"{kind.name}: its connector is two linear layers and nothing else (mlp with norm: "
            f"false), this model's has {has}"
        )
    width = ours.text_config.hidden_size
    if connector.get("hidden", width) != width:
        raise ValueError(
            f"{kind.name}: between its two layers it is as wide as the language model, {width}, "
            f"this model {connector['hidden']}"
        )
    found = tiling(images, kind.name)
    if found != ("any_resolution" if kind.tiles else "none"):
        has = "any_resolution tiles and a newline" if kind.tiles else "no tiles"
        raise ValueError(f"{kind.name}: it has {has}, this model cuts images by {found}")
    text = processor.template.image_text
    if text.asked != processor.image_token or text.written != processor.image_token:
        raise ValueError(
            f"{kind.name}: an image is its image token alone, this model writes {text.written!r}"
        )


def _processor(kind: _Kind, processor: Processor, config: Any) -> Any:
    """Their processor. OneVision's own needs torchvision, for video, and does not cut images where
    there are several; LLaVA-NeXT's makes the same of one image, and of several what is made here.
    """
    tokenizer = written_tokenizer(processor.tokenizer)
    square = ImageGeometry.from_dict(processor.geometry.to_dict())
    options: dict[str, Any] = {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(config.vision_feature_select_strategy == "default"),
        "chat_template": tokenizer.chat_template,
        "image_token": processor.image_token,
    }
    pictures: Any
    if not kind.tiles:
        pictures = CLIPImageProcessorPil(**image_processor(square, kind.name))
        return LlavaProcessor(pictures, tokenizer, **options)
    if square.resize == "pad" or square.short_edge > square.image_size:
        square = replace(square, resize="squash", short_edge=0)  # a rule that tiles do not ask for
    pictures = LlavaNextImageProcessorPil(
        **image_processor(square, kind.name),
        do_pad=True,
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return LlavaNextProcessor(pictures, tokenizer, **options)


def _video_token(processor: Processor) -> int:
    """The id of OneVision's token of video; one that no text has, where the tokenizer has none."""
    return int(processor.tokenizer.get_vocab().get("<video>", -1))


def _names(text: PreTrainedConfig, kind: _Kind) -> Names:
    projector = "model.multi_modal_projector."
    return [
        ("encoder.vision.", "model.vision_tower."),
        ("connector.first.", f"{projector}linear_1."),
        ("connector.second.", f"{projector}linear_2."),
        ("connector.newline.weight", "model.image_newline"),
        *body_and_head(text, kind.model),
    ]


_KINDS = (
    _Kind("llava", LlavaForConditionalGeneration, LlavaConfig, tiles=False),
    _Kind("llava_next", LlavaNextForConditionalGeneration, LlavaNextConfig, tiles=True),
    _Kind(
        "llava_onevision",
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig,
        tiles=True,
        scales=True,
    ),
)


def _composite(kind: _Kind) -> Composite:
    return Composite(kind.name, partial(_read, kind), partial(_write, kind))


LLAVA, LLAVA_NEXT, LLAVA_ONEVISION = map(_composite, _KINDS)
