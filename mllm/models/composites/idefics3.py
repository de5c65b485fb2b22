"""Idefics3 (Laurençon et al. 2024, arXiv 2408.12637, section 3.2) and SmolVLM (Marafioti et al.
2025, arXiv 2504.05299) as transformers holds them: two names for the same parts.

SigLIP with its last norm, blocks of cells joined to one wide cell, one linear layer without bias,
any causal language model. Images are cut by the tiling `split`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3VisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

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
from mllm.models.composites.text import check_token, read_tokenizer
from mllm.models.config import MultimodalConfig
from mllm.models.connectors.pixel_shuffle import PixelShuffle
from mllm.models.encoders.idefics3 import Idefics3Encoder, shares_positions
from mllm.models.encoders.preprocessor import read_preprocessor
from mllm.models.geometry import ImageGeometry
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import IMAGE_TOKEN, Processor
from mllm.models.tiles import SplitTiles

_BODY = "model.text_model."
_LONGEST = 4096  # their processors scale no edge beyond


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of the two names.

    Attributes:
        name: its `model_type`.
        config, vision, model: its classes.
        processor: the name of its processor's class, images: of its image processor's,
            video: of its video processor's, if it has one.
    """

    name: str
    config: Callable[..., PreTrainedConfig]
    vision: Callable[..., PreTrainedConfig]
    model: type[PreTrainedModel]
    processor: str
    images: str
    video: str = ""


def _read(
    kind: _Kind, path: str | Path, dtype: torch.dtype | str, weights: bool = True
) -> tuple[MultimodalModel, Processor]:
    """From its folder to our model."""
    config: Any = read_config("model", path)
    text = copy.deepcopy(config.text_config)
    check_language(text, path)
    spec = Idefics3Encoder.spec_from_folder(path)
    images = _images(read_preprocessor(path), path)
    tokenizer, token = read_tokenizer(path, config.image_token_id)
    check_token(token, IMAGE_TOKEN, path)
    connector = {"name": "pixel_shuffle", "factor": config.scale_factor, "layers": 1, "bias": False}
    geometry = ImageGeometry.from_dict(spec["geometry"])
    processor = Processor(tokenizer, geometry, connector, token, images)
    saved = read_weights(path, kind.model, dtype, weights)
    text.tie_word_embeddings = saved.tied
    ours = MultimodalConfig(
        encoder={"name": "idefics3", **spec},
        connector=connector,
        images=images,
        text_config=text,
        image_token=token,
        image_token_id=config.image_token_id,
        origin=kind.name,
    )
    return build(ours, processor, saved, _names(kind, text)), processor


def _write(kind: _Kind, model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """From our model to its folder."""
    _check(kind.name, model, processor)
    config = kind.config(
        vision_config=_vision_config(kind, model),
        text_config=writing.text_values(model),
        image_token_id=processor.image_token_id,
        scale_factor=PixelShuffle.number(model.config.connector, "factor"),
        tie_word_embeddings=writing.embedding_is_output(model),
    )
    weights = model.state_dict()
    weights.pop("connector.second.bias", None)  # zero, as `_check` saw
    save(kind.model, config, model, _names(kind, model.config.text_config), folder, weights)
    _write_processor(kind, model, processor, folder)


def _names(kind: _Kind, text: Any) -> Names:
    return [
        ("encoder.vision.", "model.vision_model."),
        ("connector.second.", "model.connector.modality_projection.proj."),
        *body_and_head(text, kind.model, _BODY),
    ]


def _images(seen: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the `images:` section that a preprocessor file describes.

    Raises:
        ValueError: images that are not scaled, or to more than their processor does.
    """
    size = seen.get("size")
    longest = size.get("longest_edge") if isinstance(size, Mapping) else None
    if type(longest) is not int:
        raise ValueError(f"{path}: the preprocessor file gives no longest_edge under size")
    if longest > _LONGEST:
        raise ValueError(
            f"{path}: the preprocessor file scales the long edge to {longest} pixels; its own "
            f"class goes no further than {_LONGEST}"
        )
    splits = seen.get("do_image_splitting")
    cuts = {} if splits is None or splits else {"whole_only": True}
    return {"tiling": "split", "longest_edge": longest, **cuts}


def _check(name: str, model: MultimodalModel, processor: Processor) -> None:
    """Refuse what the class cannot hold.

    Raises:
        ValueError: naming the part and the reason.
    """
    writing.check_encoder(model, name, "idefics3", "siglip")
    if model.encoder.spec["layer"] != -1:
        raise ValueError(
            f"{name} cannot hold encoder layer {model.encoder.spec['layer']}: it normalises after "
            "the last layer, so layer: -1 is needed"
        )
    cells = model.encoder.square.cells
    if model.config.encoder["name"] == "siglip" and shares_positions(cells):
        raise ValueError(
            f"{name} cannot hold siglip with {cells} cells a side: rounding gives some of them one "
            "position there"
        )
    spec = writing.check_connector(model, name, "pixel_shuffle")
    if (layers := PixelShuffle.number(spec, "layers")) != 1:
        raise ValueError(f"{name} cannot hold the connector's layers {layers}: it has 1")
    bias = model.connector.last_linear().bias
    if bias is not None and bool(bias.any()):
        raise ValueError(
            f"{name} cannot hold the connector's bias, which is not zero: train with bias: false"
        )
    writing.check_blocks(model, name, PixelShuffle.number(spec, "factor"))
    writing.check_tiling(model, name, "split")
    if model.config.images.get("longest_edge", 0) > _LONGEST:
        raise ValueError(f"{name} cannot hold a longest_edge of more than {_LONGEST} pixels")
    if writing.around_image(processor, name) != ("", ""):
        raise ValueError(
            f"{name} cannot hold {processor.template.image_text.written!r} for an image: its "
            "processor writes its own marks around it and nothing else"
        )
    if processor.image_token != IMAGE_TOKEN:
        raise ValueError(
            f"{name} cannot hold the image token {processor.image_token!r}: its own is "
            f"{IMAGE_TOKEN!r}"
        )
    writing.check_language_model(model, name)


def _vision_config(kind: _Kind, model: MultimodalModel) -> dict[str, Any]:
    """Return the tower's configuration under this name."""
    own = kind.vision().to_dict().keys() - {"model_type", "transformers_version", "dtype"}
    return {name: value for name, value in writing.vision_values(model).items() if name in own}


def _write_processor(
    kind: _Kind, model: MultimodalModel, processor: Processor, folder: Path
) -> None:
    tiles = processor.geometry
    assert isinstance(tiles, SplitTiles)
    pixels = writing.pixels_of(tiles.square, kind.name)
    side, longest = {"longest_edge": tiles.side}, {"longest_edge": tiles.longest_edge}
    seen = {
        **pixels,
        "do_image_splitting": not tiles.spec.get("whole_only", False),
        "do_pad": True,
        "image_processor_type": kind.images,
        "max_image_size": side,
        "size": longest,
    }
    tokens = writing.tokens_of_view(model)
    writing.write_processor(processor, {}, kind.processor, seen, folder, image_seq_len=tokens)
    if kind.video:
        video = {"video_processor_type": kind.video, "max_image_size": side, "size": side}
        writing.write_json(folder / "video_preprocessor_config.json", {**pixels, **video})


def _composite(kind: _Kind) -> Composite:
    return Composite(kind.name, partial(_read, kind), partial(_write, kind), _BODY)


IDEFICS3 = _composite(
    _Kind(
        name="idefics3",
        config=Idefics3Config,
        vision=Idefics3VisionConfig,
        model=Idefics3ForConditionalGeneration,
        processor="Idefics3Processor",
        images="Idefics3ImageProcessor",
    )
)
SMOLVLM = _composite(
    _Kind(
        name="smolvlm",
        config=SmolVLMConfig,
        vision=SmolVLMVisionConfig,
        model=SmolVLMForConditionalGeneration,
        processor="SmolVLMProcessor",
        images="SmolVLMImageProcessor",
        video="SmolVLMVideoProcessor",
    )
)
