"""Any assembly as a folder that plain transformers loads with `trust_remote_code=True`.

The folder holds weights, tokenizer and one file of Python, made of our own sources by
`mllm.export.source`; this package is not needed to load it. The layout of the classes is the one of
transformers' own vision-language models, which vLLM's Transformers modelling backend relies on: see
docs/export.md.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase

from mllm.export.source import bundle
from mllm.models.families import logits_rule
from mllm.models.modeling import MultimodalModel
from mllm.models.native import NativeGeometry
from mllm.models.positions import is_spatial
from mllm.models.processor import Processor
from mllm.models.tiles import TILINGS

MODULE = "modeling_mllm"
AUTO_MAP = {
    "AutoConfig": "MllmConfig",
    "AutoModel": "MllmModel",
    "AutoModelForImageTextToText": "MllmForConditionalGeneration",
    "AutoImageProcessor": "MllmImageProcessor",
    "AutoProcessor": "MllmProcessor",
}
_MODELS = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")
_ATTENTION = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")

_HEADER = """\
A vision-language model in one file: {encoder}, {connector} and {language_model}.

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

It was written by `mllm export --to transformers`. The code is under the Apache-2.0 licence; the
weights are under the licences of the models that they come from.
"""


def export(model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """Write a folder that transformers loads without this package.

    Raises:
        ValueError: what a folder of this kind cannot hold, with the reason.
    """
    check(model, processor)
    text = source(model)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{MODULE}.py"
    file.write_text(text, encoding="utf-8")
    module = _load(file)
    try:
        _write_model(module, model, processor, folder)
        _write_processor(module, processor, folder)
    finally:
        del sys.modules[module.__name__]
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)


def check(model: MultimodalModel, processor: Processor) -> None:
    """Refuse what the exported classes have no place for.

    Raises:
        ValueError: with the reason.
    """
    text_config = model.config.text_config
    if is_spatial(text_config):
        raise ValueError(
            f"the language model {text_config.model_type} has positions in three directions, which "
            "an exported model does not make; write the class that it came from"
        )
    if model.config.fusion:
        raise ValueError(
            f"the fusion {model.config.fusion['name']} reaches into the language model's layers, "
            "and an exported model has its visual tokens in the sequence only"
        )
    if processor.images.get("regions") == "feature":
        raise ValueError(
            "images.regions: feature puts the mean of visual tokens into the text, and there is no "
            "way to hand transformers a box; decimals and thousandths can be exported"
        )
    if model.connector.reads_text(model.config.connector):
        raise ValueError(
            "the connector reads what is asked about an image, which a processor of transformers "
            "is not told; connector q_former without text can be exported"
        )
    text = processor.template.image_text
    if text.before_begin:
        raise ValueError(
            "images stand before the begin token here, as in BLIP-2, which the exported processor "
            "does not do; give --to blip2"
        )
    if text.asked not in (processor.image_token, text.written):
        raise ValueError(
            f"the chat template writes {text.asked!r} for an image, which is neither the image "
            f"token {processor.image_token!r} nor what is tokenised, {text.written!r}"
        )
    if model.config.bidirectional_images:
        raise ValueError(
            "the tokens of this model's images see each other in both directions, and an exported "
            "language model has its ordinary mask; export it --to the class that it began from"
        )
    body, name = model.language_model.base_model, type(model.language_model).__name__
    alone: Any = AutoModel._model_mapping[type(model.language_model.config)]
    if type(body) is not alone:
        raise ValueError(f"{name}: AutoModel does not build the body of this language model alone")


def source(model: MultimodalModel) -> str:
    """Return the file of Python."""
    config: Any = model.config
    encoder, images = config.encoder, tiling(config.images)
    parts = [encoder, *(encoder[key] for key in ("first", "second") if key in encoder)]
    tables = {
        "ENCODERS": tuple(dict.fromkeys(part["name"] for part in reversed(parts))),
        "CONNECTORS": (config.connector["name"],),
        "TILINGS": (images["tiling"],) if images else (),
    }
    header = _HEADER.format(
        encoder=" and ".join(part["name"] for part in parts[1:] or parts),
        connector=config.connector["name"],
        language_model=config.text_config.model_type,
    )
    sections = {"tiles"} if images else set()
    if images and TILINGS[images["tiling"]].NEWLINE:
        sections.add("newline")
    if isinstance(model.encoder.geometry, NativeGeometry):
        sections.add("native")
    text = bundle(header, tables, frozenset(sections))
    for flag in _ATTENTION:
        able = bool(getattr(type(model.language_model), flag))
        text = text.replace(f"    {flag} = True\n", f"    {flag} = {able}\n")
    return text


def tiling(images: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an `images:` section says about tiles; the rest is for training data."""
    if images.get("tiling") is None:
        return {}
    return {name: value for name, value in images.items() if name not in ("regions", "clip_tokens")}


def _load(file: Path) -> ModuleType:
    """Import the file under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"_exported.{id(file)}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def _write_model(module: Any, model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights."""
    rule = logits_rule(model.language_model.config)
    head: Any = model.get_output_embeddings()
    text_config = copy.deepcopy(model.language_model.config)
    text_config._attn_implementation = None
    if rule.times != 1.0:
        text_config.logit_scale = rule.times  # where vLLM looks for it
    config = module.MllmConfig(
        encoder=model.config.encoder,
        connector=model.config.connector,
        images=tiling(model.config.images),
        text_config=text_config,
        image_token_id=processor.image_token_id,
        head_bias=head.bias is not None,
        logits_times=rule.times,
        logits_cap=rule.cap,
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=model.dtype,
    )
    config.auto_map = {auto: f"{MODULE}.{AUTO_MAP[auto]}" for auto in _MODELS}
    with torch.device("meta"):
        exported = module.MllmForConditionalGeneration(config)
    exported.load_state_dict(dict(_renamed(model)), assign=True)
    exported.tie_weights()
    exported.generation_config = model.generation_config
    exported.save_pretrained(folder)


def _renamed(model: MultimodalModel) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of the exported classes."""
    head = _place(model, model.get_output_embeddings())
    body = _place(model, model.language_model.base_model)
    places = {
        f"{head}.": "lm_head.",
        f"{body}.": "model.language_model.",
        "encoder.": "model.vision_tower.",
        "connector.": "model.connector.",
    }
    for name, weight in model.state_dict().items():
        old = next(prefix for prefix in places if name.startswith(prefix))
        yield places[old] + name.removeprefix(old), weight


def _place(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module in the model."""
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0]


def _write_processor(module: Any, processor: Processor, folder: Path) -> None:
    """Write the tokenizer and processor_config.json."""
    make_processor(module, processor).save_pretrained(folder)
    file = folder / "processor_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    auto = {name: f"{MODULE}.{AUTO_MAP[name]}" for name in ("AutoImageProcessor", "AutoProcessor")}
    values["auto_map"] = values["image_processor"]["auto_map"] = auto
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def make_processor(module: Any, processor: Processor) -> Any:
    """Return the exported processor, of a module that has its classes."""
    tokenizer: PreTrainedTokenizerBase = copy.deepcopy(processor.tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    written = processor.template.image_text.written
    asked = processor.template.image_text.asked
    images = module.MllmImageProcessor(
        geometry=processor.geometry.to_dict(),
        images=tiling(processor.images),
        connector=processor.connector,
    )
    return module.MllmProcessor(
        images,
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_token=processor.image_token,
        image_text=processor.image_token if asked == written else written,
        image_marks=processor.template.image_marks,
    )
