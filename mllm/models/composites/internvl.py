"""InternVL as transformers holds it, `InternVLForConditionalGeneration` (InternVL 3, Zhu et al.
2025, arXiv 2504.10479; the same parts since 1.5, arXiv 2404.16821, section 3.1).

InternViT, blocks of cells joined to one wide cell, LayerNorm and a two-layer MLP, any causal
language model. Images are cut into `dynamic` tiles, and stand in the text as `<img>`, their tokens
and `</img>`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from mllm.models.checks import read_config
from mllm.models.composites import writing
from mllm.models.composites.base import Composite
from mllm.models.composites.folder import (
    Names,
    body_and_head,
    build,
    check_language,
    one_layer,
    read_weights,
    save,
)
from mllm.models.composites.text import check_token, named_token, read_tokenizer
from mllm.models.config import MultimodalConfig
from mllm.models.connectors.pixel_shuffle import PixelShuffle
from mllm.models.encoders.internvl import InternVlEncoder
from mllm.models.encoders.preprocessor import read_preprocessor
from mllm.models.geometry import ImageGeometry
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.template import ImageText


def read(
    path: str | Path, dtype: torch.dtype | str, weights: bool = True
) -> tuple[MultimodalModel, Processor]:
    """From its folder to our model."""
    config: Any = read_config("model", path)
    layer, factor = _settings(config, path)
    text = copy.deepcopy(config.text_config)
    check_language(text, path)
    spec = InternVlEncoder.spec_from_folder(path, layer=layer)
    tokenizer, token = read_tokenizer(path, config.image_token_id)
    check_token(token, named_token(tokenizer, "context_image_token", path), path)
    start, end = (named_token(tokenizer, f"{name}_image_token", path) for name in ("start", "end"))
    seen = read_preprocessor(path)  # its processor always cuts, whatever crop_to_patches says
    images = {
        "tiling": "dynamic",
        "tiles": seen.get("max_patches", 12),
        "min_tiles": seen.get("min_patches", 1),
    }
    connector = {"name": "pixel_shuffle", "factor": factor, "layers": 2}
    geometry = ImageGeometry.from_dict(spec["geometry"])
    image_text = ImageText(token, f"{start}{token}{end}")
    processor = Processor(tokenizer, geometry, connector, token, images, image_text)
    saved = read_weights(path, InternVLForConditionalGeneration, dtype, weights)
    text.tie_word_embeddings = saved.tied
    ours = MultimodalConfig(
        encoder={"name": "internvl", **spec},
        connector=connector,
        images=images,
        text_config=text,
        image_token=token,
        image_token_id=config.image_token_id,
        origin=INTERNVL.name,
    )
    return build(ours, processor, saved, _names(text)), processor


def write(model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """From our model to its folder."""
    _check(model)
    named = _named_tokens(processor)
    square, images = model.encoder.square, model.config.images
    pixels = writing.pixels_of(square, "internvl")
    tokens = writing.tokens_of_view(model)
    config = InternVLConfig(
        vision_config=_vision_config(model),
        text_config=writing.text_values(model),
        image_token_id=processor.image_token_id,
        image_seq_length=tokens,
        downsample_ratio=1 / PixelShuffle.number(model.config.connector, "factor"),
        tie_word_embeddings=writing.embedding_is_output(model),
    )
    names = _names(model.config.text_config)
    save(InternVLForConditionalGeneration, config, model, names, folder)
    cuts = "tiling" in images
    tiles = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": cuts,
        "max_patches": images.get("tiles", 12) if cuts else 1,
        "min_patches": images.get("min_tiles", 1) if cuts else 1,
    }
    writing.write_processor(
        processor,
        named,
        "InternVLProcessor",
        {**pixels, **tiles},
        folder,
        image_seq_length=tokens,
    )
    video = {**pixels, "video_processor_type": "InternVLVideoProcessor"}
    writing.write_json(folder / "video_preprocessor_config.json", video)


def _names(text: Any) -> Names:
    projector = "model.multi_modal_projector."
    return [
        ("encoder.vision.", "model.vision_tower."),
        ("connector.norm.", f"{projector}layer_norm."),
        ("connector.first.", f"{projector}linear_1."),
        ("connector.second.", f"{projector}linear_2."),
        *body_and_head(text, InternVLForConditionalGeneration),
    ]


def _settings(config: Any, path: str | Path) -> tuple[int, int]:
    """Return the tower's layer, counted back, and the side of a block.

    Raises:
        ValueError: a setting that cannot be built here.
    """
    layer, ratio = one_layer(config.vision_feature_layer, path), config.downsample_ratio
    if layer >= 0:
        layer -= config.vision_config.num_hidden_layers + 1
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{path}: vision_feature_select_strategy {config.vision_feature_select_strategy!r} "
            "keeps the class token, which has no place on the grid"
        )
    if config.projector_hidden_act != "gelu":
        raise ValueError(
            f"{path}: projector_hidden_act {config.projector_hidden_act!r} cannot be read, only "
            "gelu"
        )
    factor = round(1 / ratio)
    if factor < 1 or int(1 / ratio) != factor or factor * ratio != 1:
        raise ValueError(f"{path}: downsample_ratio {ratio} is not 1 over a whole number")
    return layer, factor


def _check(model: MultimodalModel) -> None:
    """Refuse what the class cannot hold.

    Raises:
        ValueError: naming the part and the reason.
    """
    writing.check_encoder(model, "internvl", "internvl")
    spec = writing.check_connector(model, "internvl", "pixel_shuffle")
    width = model.config.text_config.hidden_size
    factor, layers = PixelShuffle.number(spec, "factor"), PixelShuffle.number(spec, "layers")
    if layers != 2:
        raise ValueError(f"internvl cannot hold the connector's layers {layers}: it has 2")
    if PixelShuffle.number(spec, "hidden", width) != width:
        raise ValueError(
            f"internvl cannot hold the connector's hidden {spec['hidden']}: it is the language "
            f"model's width there, {width}"
        )
    if factor & (factor - 1):
        raise ValueError(
            f"internvl cannot hold the connector's factor {factor}: its reciprocal is stored, "
            "which is exact for powers of 2"
        )
    writing.check_blocks(model, "internvl", factor)
    writing.check_tiling(model, "internvl", "dynamic", "none")
    if model.config.images.get("thumbnail", True) is False:
        raise ValueError("internvl cannot hold thumbnail: false: its processor always adds one")
    writing.check_language_model(model, "internvl")


def _vision_config(model: MultimodalModel) -> dict[str, Any]:
    """Return the tower's configuration; a tower that was cut has no norm at its end."""
    values = {**writing.vision_values(model), "use_mask_token": False}  # nothing reads it
    return {**values, "use_mean_pooling": True} if model.encoder.spec["layer"] != -1 else values


def _named_tokens(processor: Processor) -> dict[str, str]:
    """Return the tokens under the names by which the processor looks them up.

    Raises:
        ValueError: what stands around an image is neither nothing nor one special token.
    """
    tokenizer: Any = processor.tokenizer
    before, after = writing.around_image(processor, "internvl")
    for text in filter(None, (before, after)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1 or not processor.template.is_special(ids[0]):
            raise ValueError(
                f"internvl cannot hold the text {text!r} beside an image: one special token fits"
            )
    return {
        "context_image_token": processor.image_token,
        "end_image_token": after,
        "start_image_token": before,
        "video_token": getattr(tokenizer, "video_token", "<video>"),
    }


INTERNVL = Composite("internvl", read, write)
