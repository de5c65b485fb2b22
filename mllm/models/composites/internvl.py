"""InternVL as transformers holds it, `InternVLForConditionalGeneration` (InternVL 3, Zhu et al. 2025,
arXiv 2504.10479; the same parts since 1.5, arXiv 2404.16821, section 3.1).

InternViT, blocks of cells joined to one wide cell, LayerNorm and a two-layer MLP, any causal
language model. Images are cut into `dynamic` tiles, and stand in the text as `<img>`, their tokens
and `</img>`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from mllm.models.composites import writing
from mllm.models.composites.base import Composite
from mllm.models.composites.reading import (
    Looks,
    Whole,
    join,
    read_config,
    read_model,
    read_tokenizer,
    special_text,
)
from mllm.models.connectors import PixelShuffle
from mllm.models.encoders.internvl import InternVlEncoder
from mllm.models.encoders.preprocessor import read_preprocessor
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.template import ImageText

_CONNECTOR = {"norm": "layer_norm", "first": "linear_1", "second": "linear_2"}
_PROJECTOR, _TOWER = "model.multi_modal_projector", "model.vision_tower."


def read(path: str | Path, dtype: torch.dtype | str) -> tuple[MultimodalModel, Processor]:
    """Read their folder; see `Composite`."""
    config = read_config(path, InternVLConfig)
    layer, factor = _checked(config, path)
    spec = InternVlEncoder.spec_from_folder(path, layer=layer)
    tokenizer = read_tokenizer(path)
    token, start, end = (
        special_text(tokenizer, f"{name}_image_token", path) for name in ("context", "start", "end")
    )
    seen = read_preprocessor(path)  # what it says of crop_to_patches is overruled by the processor
    images = {
        "tiling": "dynamic",
        "tiles": seen.get("max_patches", 12),
        "min_tiles": seen.get("min_patches", 1),
    }
    looks = Looks(
        encoder={"name": "internvl", **spec},
        connector={"name": "pixel_shuffle", "factor": factor, "layers": 2},
        images=images,
        image_token=token,
        image_text=ImageText(token, f"{start}{token}{end}"),
    )
    theirs = read_model(path, InternVLForConditionalGeneration, dtype)
    projector = theirs.model.multi_modal_projector.state_dict()
    whole = Whole(
        origin="internvl",
        vision=theirs.model.vision_tower,
        body=theirs.model.language_model,
        head=theirs.lm_head,
        connector=_renamed(projector, {there: here for here, there in _CONNECTOR.items()}),
        generation=theirs.generation_config,
        image_id=config.image_token_id,
    )
    return join(whole, tokenizer, looks)


def write(model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """Write the folder of their class; see `Composite`."""
    _check(model)
    names = _named_tokens(processor)
    tensors, tied = writing.text_tensors(model, "model.language_model.")
    vision: Any = model.encoder.vision
    tensors |= {_TOWER + name: weight for name, weight in vision.state_dict().items()}
    tensors |= {
        f"{_PROJECTOR}.{name}": weight
        for name, weight in _renamed(model.connector.state_dict(), _CONNECTOR).items()
    }
    factor = model.connector.factor
    config = InternVLConfig(
        vision_config=_vision_config(model),
        text_config=writing.text_config(model, tied),
        image_token_id=processor.image_token_id,
        image_seq_length=writing.tokens_of_view(processor),
        downsample_ratio=1 / factor,
        tie_word_embeddings=tied,
    )
    writing.write_model(InternVLForConditionalGeneration, config, tensors, model, folder)
    square, images = model.encoder.geometry, model.config.images
    seen = {
        **writing.pixels_of(square),
        "size": writing.squares_of(square.image_size),
    }
    tiles = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": bool(images),
        "max_patches": images.get("tiles", 12) if images else 1,
        "min_patches": images.get("min_tiles", 1) if images else 1,
    }
    writing.write_processor(
        processor.tokenizer,
        names,
        "InternVLProcessor",
        {**seen, **tiles},
        folder,
        image_seq_length=writing.tokens_of_view(processor),
    )
    video = {**seen, "video_processor_type": "InternVLVideoProcessor"}
    writing.write_json(folder / "video_preprocessor_config.json", video)


def _checked(config: InternVLConfig, path: str | Path) -> tuple[int, int]:
    """Return the tower's layer and the side of a block.

    Raises:
        ValueError: a setting that cannot be built here.
    """
    layer, ratio = config.vision_feature_layer, config.downsample_ratio
    depth = config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise ValueError(f"{path}: vision_feature_layer {layer}: features of one layer are needed")
    if layer >= 0:
        layer -= depth + 1
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{path}: vision_feature_select_strategy {config.vision_feature_select_strategy!r} "
            "keeps the class token, which has no place on the grid"
        )
    if config.projector_hidden_act != "gelu":
        raise ValueError(
            f"{path}: projector_hidden_act {config.projector_hidden_act!r} is not gelu"
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
    connector = model.connector
    assert isinstance(connector, PixelShuffle)
    if connector.layers != 2:
        raise ValueError(
            f"internvl cannot hold the connector's layers {connector.layers}: it has 2"
        )
    width = connector.second.out_features
    if connector.first.out_features != width:
        raise ValueError(
            f"internvl cannot hold the connector's hidden {spec['hidden']}: it is the language "
            f"model's width there, {width}"
        )
    if connector.factor & (connector.factor - 1):
        raise ValueError(
            f"internvl cannot hold the connector's factor {connector.factor}: its reciprocal is "
            "stored, which is exact for powers of 2"
        )
    writing.check_blocks(model, "internvl", connector.factor)
    writing.check_tiling(model, "internvl", "dynamic", "")
    if model.config.images.get("thumbnail", True) is False:
        raise ValueError("internvl cannot hold thumbnail: false: its processor always adds one")
    writing.check_language_model(model, "internvl")


def _vision_config(model: MultimodalModel) -> InternVLVisionConfig:
    """Return the tower's configuration; a tower that was cut has no norm at its end."""
    vision: Any = model.encoder.vision
    config = copy.deepcopy(vision.config)
    config._attn_implementation = None
    config.dtype = model.dtype
    if model.encoder.spec["layer"] != -1:
        config.use_mean_pooling = True
    return config  # type: ignore[no-any-return]


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


def _renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Replace the module's name that a weight's name begins with."""
    pairs = ((name.partition("."), tensor) for name, tensor in tensors.items())
    return {f"{names[module]}.{rest}": tensor for (module, _, rest), tensor in pairs}


INTERNVL = Composite("internvl", read, write)
