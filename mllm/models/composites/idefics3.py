"""Idefics3 (Laurençon et al. 2024, arXiv 2408.12637, section 3.2) and SmolVLM (Marafioti et al.
2025, arXiv 2504.05299) as transformers holds them: two names for the same parts.

SigLIP with its last norm, blocks of cells joined to one wide cell, one linear layer without bias,
any causal language model. Images are cut by the tiling `split`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from mllm.models.connectors import PixelShuffle
from mllm.models.encoders.idefics3 import Idefics3Encoder, shares_positions
from mllm.models.encoders.preprocessor import read_preprocessor
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import IMAGE_TOKEN, Processor
from mllm.models.template import ImageText

_PROJECTION, _TOWER = "model.connector.modality_projection.proj.weight", "model.vision_model."
_LONGEST = 4096  # their processors scale no edge beyond


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of the two names.

    Attributes:
        name: its `model_type`.
        config, vision, model: its classes.
        processor: the name of its processor's class, images: of its image processor's.
    """

    name: str
    config: type[PreTrainedConfig]
    vision: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    processor: str
    images: str


def _reader(
    kind: _Kind,
) -> Callable[[str | Path, torch.dtype | str], tuple[MultimodalModel, Processor]]:
    def read(path: str | Path, dtype: torch.dtype | str) -> tuple[MultimodalModel, Processor]:
        config: Any = read_config(path, kind.config)
        spec = Idefics3Encoder.spec_from_folder(path)
        images = _images(read_preprocessor(path), path)
        tokenizer = read_tokenizer(path)
        looks = Looks(
            encoder={"name": "idefics3", **spec},
            connector={
                "name": "pixel_shuffle",
                "factor": config.scale_factor,
                "layers": 1,
                "bias": False,
            },
            images=images,
            image_token=IMAGE_TOKEN,
            image_text=ImageText(IMAGE_TOKEN, IMAGE_TOKEN),
        )
        theirs = read_model(path, kind.model, dtype)
        whole = Whole(
            origin=kind.name,
            vision=theirs.model.vision_model,
            body=theirs.model.text_model,
            head=theirs.lm_head,
            connector={"second.weight": theirs.model.connector.modality_projection.proj.weight},
            generation=theirs.generation_config,
            image_id=config.image_token_id,
        )
        return join(whole, tokenizer, looks)

    return read


def _writer(kind: _Kind) -> Callable[[MultimodalModel, Processor, Path], None]:
    def write(model: MultimodalModel, processor: Processor, folder: Path) -> None:
        _check(kind.name, model, processor)
        tensors, tied = writing.text_tensors(model, "model.text_model.")
        vision: Any = model.encoder.vision
        tensors |= {_TOWER + name: weight for name, weight in vision.state_dict().items()}
        tensors[_PROJECTION] = model.connector.last_linear().weight
        config = kind.config(
            vision_config=_vision_config(kind, model),
            text_config=writing.text_config(model, tied),
            image_token_id=processor.image_token_id,
            scale_factor=model.connector.factor,
            tie_word_embeddings=tied,
        )
        writing.write_model(kind.model, config, tensors, model, folder)
        _write_processor(kind, processor, folder)

    return write


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
    cells = model.encoder.geometry.cells
    if model.config.encoder["name"] == "siglip" and shares_positions(cells):
        raise ValueError(
            f"{name} cannot hold siglip with {cells} cells a side: rounding gives some of them one "
            "position there"
        )
    writing.check_connector(model, name, "pixel_shuffle")
    connector = model.connector
    assert isinstance(connector, PixelShuffle)
    if connector.layers != 1:
        raise ValueError(f"{name} cannot hold the connector's layers {connector.layers}: it has 1")
    bias = connector.second.bias
    if bias is not None and bool(bias.any()):
        raise ValueError(
            f"{name} cannot hold the connector's bias, which is not zero: train with bias: false"
        )
    writing.check_blocks(model, name, connector.factor)
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


def _vision_config(kind: _Kind, model: MultimodalModel) -> PreTrainedConfig:
    """Return the tower's configuration under this name."""
    vision: Any = model.encoder.vision
    names = Idefics3VisionConfig().to_dict().keys() & vision.config.to_dict().keys()
    names -= {"model_type", "transformers_version", "dtype"}
    values = {name: getattr(vision.config, name) for name in names if not name.startswith("_")}
    return kind.vision(**copy.deepcopy(values))


def _write_processor(kind: _Kind, processor: Processor, folder: Path) -> None:
    tiles: Any = processor.geometry
    seen = {
        **writing.pixels_of(tiles.square),
        "do_image_splitting": not tiles.spec.get("whole_only", False),
        "do_pad": True,
        "image_processor_type": kind.images,
        "max_image_size": {"longest_edge": tiles.side},
        "size": {"longest_edge": tiles.longest_edge},
    }
    writing.write_processor(
        processor.tokenizer,
        {},
        kind.processor,
        seen,
        folder,
        image_seq_len=writing.tokens_of_view(processor),
    )
    if kind.name == "smolvlm":
        video = {
            **writing.pixels_of(tiles.square),
            "max_image_size": {"longest_edge": tiles.side},
            "size": {"longest_edge": tiles.side},
            "video_processor_type": "SmolVLMVideoProcessor",
        }
        writing.write_json(folder / "video_preprocessor_config.json", video)


def _composite(kind: _Kind) -> Composite:
    return Composite(kind.name, _reader(kind), _writer(kind))


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
    )
)
