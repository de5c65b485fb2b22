"""BLIP-2 (Li et al. 2023, arXiv 2301.12597): a ViT, a Q-Former, and a decoder-only language model.

Its processor puts the tokens of the image before everything, the tokenizer's begin token included:
so does our reading of a raw document (`ImageText.before_begin`). A model that has a chat template
is written with a processor that leaves the tokens of images to the template.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
)

from mllm.models.composites.base import Composite
from mllm.models.composites.folder import (
    Names,
    build,
    check_language,
    read_weights,
    save,
    text_config,
)
from mllm.models.composites.images import image_processor
from mllm.models.composites.text import read_tokenizer, written_tokenizer
from mllm.models.config import MultimodalConfig
from mllm.models.connectors.options import whole
from mllm.models.connectors.q_former import NAMES, SIZES, QFormer
from mllm.models.encoders.blip2 import Blip2Encoder
from mllm.models.encoders.preprocessor import read_file
from mllm.models.errors import loading
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


def read(path: str | Path, dtype: torch.dtype | str) -> tuple[MultimodalModel, Processor]:
    """From its folder to our model."""
    with loading("model", path):
        config: Any = AutoConfig.from_pretrained(path)
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
    queries = connector["visual_tokens"]
    first = _image_first(path)
    tokenizer, token = read_tokenizer(path, config.image_token_id, None if first else queries)
    processor = Processor(
        tokenizer,
        ImageGeometry.from_dict(encoder["geometry"]),
        connector,
        token,
        image_text=ImageText(token if first else token * queries, token, before_begin=first),
    )
    ours = MultimodalConfig(
        encoder=encoder,
        connector=connector,
        text_config=text,
        image_token=token,
        image_token_id=config.image_token_id,
        origin=BLIP2.name,
    )
    weights, generation = read_weights(path, Blip2ForConditionalGeneration, dtype)
    return build(ours, processor, weights, _NAMES, generation), processor


def _image_first(path: str | Path) -> bool:
    """Whether its processor puts the tokens of an image before the text."""
    return read_file(path, "processor_config.json").get("num_query_tokens") is not None


def write(model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """From our model to its folder."""
    ours = model.config
    _check(ours)
    connector, spec = ours.connector, ours.encoder
    queries = whole(connector, "visual_tokens", SIZES["visual_tokens"])
    text = text_config(model)
    text["eos_token_id"] = model.generation_config.eos_token_id  # its generate asks only this one
    text["pad_token_id"] = model.generation_config.pad_token_id
    config = Blip2Config(
        vision_config=spec["config"],
        qformer_config={
            **{name: whole(connector, option, SIZES[option]) for option, name in NAMES.items()},
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
    if ours.images:
        raise ValueError(
            f"blip2: it has no tiles, this model cuts images by {ours.images['tiling']}"
        )


def _processor(processor: Processor, queries: int) -> Any:
    """Its processor, which writes the tokens of an image, or has them written by the template."""
    text, token = processor.template.image_text, processor.image_token
    if token != "<image>" or text.written != token:
        raise ValueError(f"blip2: an image is the token '<image>' alone, not {text.written!r}")
    tokenizer = written_tokenizer(processor.tokenizer)
    geometry = ImageGeometry.from_dict(processor.geometry.to_dict())
    options = image_processor(geometry, "blip2")
    pictures: Any = CLIPImageProcessorPil(**options)
    if geometry.resize == "squash":
        unused = ("do_center_crop", "crop_size")
        pictures = BlipImageProcessorPil(**{k: v for k, v in options.items() if k not in unused})
    if not tokenizer.chat_template:
        return Blip2Processor(pictures, tokenizer, queries if text.before_begin else None)
    tokenizer.chat_template = _writing(tokenizer, text.asked, token * queries)
    return Blip2Processor(pictures, tokenizer, None)


def _writing(tokenizer: Any, asked: str, tokens: str) -> str:
    """Return the chat template that writes so many tokens for an image.

    Raises:
        ValueError: a template whose text for an image cannot be exchanged.
    """
    template: str = tokenizer.chat_template
    if asked == tokens:
        return template
    changed = template.replace(asked, tokens)
    parts: Any = [{"type": "image"}, {"type": "text", "text": "probe"}]
    probe = [{"role": "user", "content": parts}]
    before, after = (
        tokenizer.apply_chat_template(probe, chat_template=one, tokenize=False)
        for one in (template, changed)
    )
    if before.replace(asked, tokens) != after or tokens not in after:
        raise ValueError(
            "blip2: the chat template must write the tokens of an image, and this one's "
            f"{asked!r} cannot be exchanged for them"
        )
    return changed


BLIP2 = Composite("blip2", read, write)
