"""BLIP-2 (Li et al. 2023, arXiv 2301.12597): a ViT, a Q-Former, and a decoder-only language model.

Its processor puts the tokens of the image before everything, the tokenizer's begin token included:
so does our reading of a raw document (`ImageText.before_begin`). It has no place for a chat
template, nor for images between texts. A model that has a chat template, or was not read from such
a folder, is therefore written with LLaVA's processor, which puts the tokens of an image where the
image stands: as in training for conversations, but behind the begin token of other texts.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaProcessor,
)

from mllm.models.checks import read_config
from mllm.models.composites import writing
from mllm.models.composites.base import Composite
from mllm.models.composites.folder import (
    Names,
    build,
    check_in_sequence,
    check_language,
    read_weights,
    save,
    text_config,
)
from mllm.models.composites.images import image_processor, tiling
from mllm.models.composites.text import read_tokenizer, written_tokenizer
from mllm.models.config import MultimodalConfig
from mllm.models.connectors.q_former import NAMES, QFormer
from mllm.models.encoders.blip2 import Blip2Encoder
from mllm.models.encoders.preprocessor import read_file
from mllm.models.geometry import ImageGeometry
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.template import ImageText

_NAMES: Names = (
    ("encoder.vision.", "vision_model."),
    ("connector.query_tokens", "query_tokens"),
    ("connector.qformer.", "qformer."),
    ("connector.language_projection.", "language_projection."),
)


def read(
    path: str | Path, dtype: torch.dtype | str, weights: bool = True
) -> tuple[MultimodalModel, Processor]:
    """From its folder to our model."""
    config: Any = read_config("model", path)
    text = copy.deepcopy(config.text_config)
    if text.is_encoder_decoder:
        raise ValueError(
            f"{path}: its language model is {text.model_type}, an encoder and a decoder; only "
            "causal language models can be read"
        )
    if config.image_token_id is None:
        raise ValueError(
            f"{path}: config.json has no image_token_index; take a newer copy of the checkpoint"
        )
    check_language(text, path)
    encoder = {"name": "blip2", **Blip2Encoder.spec_from_folder(path)}
    connector = QFormer.spec_from_folder({"name": "q_former", "path": str(path)})
    tokenizer, token = read_tokenizer(path, config.image_token_id)
    processor = Processor(
        tokenizer,
        ImageGeometry.from_dict(encoder["geometry"]),
        connector,
        token,
        image_text=ImageText(token, token, before_begin=_image_first(path)),
    )
    ours = MultimodalConfig(
        encoder=encoder,
        connector=connector,
        text_config=text,
        image_token=token,
        image_token_id=config.image_token_id,
        origin=BLIP2.name,
    )
    saved = read_weights(path, Blip2ForConditionalGeneration, dtype, weights)
    return build(ours, processor, saved, _NAMES), processor


def _image_first(path: str | Path) -> bool:
    """Whether its processor puts the tokens of an image before the text."""
    return read_file(path, "processor_config.json").get("num_query_tokens") is not None


def write(model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """From our model to its folder."""
    ours = model.config
    _check(ours)
    writing.check_positions_and_width(model, BLIP2.name)
    connector, spec = ours.connector, ours.encoder
    queries = QFormer.number(connector, "visual_tokens")
    text = text_config(model)
    text["eos_token_id"] = model.generation_config.eos_token_id  # its generate asks only this one
    text["pad_token_id"] = model.generation_config.pad_token_id
    config = Blip2Config(
        vision_config={key: value for key, value in spec["config"].items() if key != "dtype"},
        qformer_config={
            **{name: QFormer.number(connector, option) for option, name in NAMES.items()},
            "encoder_hidden_size": model.encoder.width,
        },
        text_config=text,
        num_query_tokens=queries,
        image_token_index=processor.image_token_id,
    )
    theirs = _processor(processor, queries)
    save(Blip2ForConditionalGeneration, config, model, _NAMES, folder)
    theirs.save_pretrained(folder)


def _check(ours: Any) -> None:
    """Refuse what the class cannot hold."""
    check_in_sequence(ours, BLIP2.name)
    spec, connector = ours.encoder, ours.connector["name"]
    if spec["name"] != "blip2" or spec["layer"] != -1:
        has = "one without its last layers" if spec["name"] == "blip2" else spec["name"]
        raise ValueError(f"blip2: its encoder is the whole blip2, this model's is {has}")
    if not spec["geometry"].get("class_cell"):
        raise ValueError(
            "blip2: its Q-Former reads the class token, this model leaves it out (class_cell)"
        )
    if connector != "q_former":
        raise ValueError(f"blip2: its connector is q_former, this model's is {connector}")
    if ours.connector.get("text"):
        raise ValueError("blip2: its Q-Former reads no text, this model's does (text)")
    if (found := tiling(ours.images, "blip2")) != "none":
        raise ValueError(f"blip2: it has no tiles, this model cuts images by {found}")


def _processor(processor: Processor, queries: int) -> Any:
    """Its own processor where there is no chat template, else LLaVA's, told how many tokens."""
    text, token = processor.template.image_text, processor.image_token
    if text.asked != token or text.written != token:
        raise ValueError(f"blip2: an image is its image token alone, not {text.written!r}")
    tokenizer = written_tokenizer(processor.tokenizer)
    geometry = ImageGeometry.from_dict(processor.geometry.to_dict())
    options = image_processor(geometry, "blip2")
    if text.before_begin and tokenizer.chat_template:
        logging.getLogger(__name__).warning(
            "blip2: written with LLaVA's processor, as BLIP-2's has no chat template: it makes of "
            "conversations what training made of them, but puts the tokens of an image behind the "
            "begin token of a caption, where training put them before"
        )
    elif text.before_begin and token == "<image>":
        pictures: Any = CLIPImageProcessorPil(**options)
        if geometry.resize == "squash":
            unused = ("do_center_crop", "crop_size")
            kept = {name: value for name, value in options.items() if name not in unused}
            pictures = BlipImageProcessorPil(**kept)
        return Blip2Processor(pictures, tokenizer, queries)
    return LlavaProcessor(
        CLIPImageProcessorPil(**options),
        tokenizer,
        patch_size=geometry.image_size,  # one token for the whole square
        num_additional_image_tokens=queries - 1,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=token,
    )


BLIP2 = Composite("blip2", read, write, body="language_model.{}.")
