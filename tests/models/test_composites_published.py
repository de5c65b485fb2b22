"""Folders in the layouts that published checkpoints have: fewer fields, older names of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PillowImage
from transformers import AutoModelForImageTextToText, Idefics3ImageProcessorPil, LlamaConfig

from mllm.models.assemble import load
from mllm.models.composites import COMPOSITES
from tests.models import composite_folders, llava_folders
from tests.models.composite_checks import check_read, messages_in_files, same_weights
from tests.models.own_processors import own_processor, usable
from tests.models.test_composites_llava import logits, questions

Values = dict[str, Any]
needs_images = pytest.mark.skipif(
    not usable(Idefics3ImageProcessorPil),
    reason="its image processors need torchvision in this transformers, not from 5.18",
)


def first_llava(found: Values) -> Values:
    """LLaVA 1.5's: values that differ from a class's, older names, the vocabulary's size on top."""
    text, vision = found["text_config"], found["vision_config"]
    plain = LlamaConfig().to_dict()
    kept = {key: value for key, value in text.items() if key in plain and plain[key] != value}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "dtype"):
        kept.pop(name, None)
    sizes = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads")
    sizes += ("num_hidden_layers", "patch_size", "projection_dim", "model_type")
    return {
        "model_type": found["model_type"],
        "ignore_index": -100,
        "image_token_index": 300,
        "pad_token_id": -1,
        "projector_hidden_act": "gelu",
        "text_config": {**kept, "model_type": text["model_type"], "torch_dtype": "float16"},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vision_config": {**{name: vision[name] for name in sizes}, "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 320,
    }


def first_llava_next(found: Values) -> Values:
    points = {"image_grid_pinpoints": found["image_grid_pinpoints"]}
    return {**first_llava(found), **points, "use_image_newline_parameter": True}


def newer_llava(found: Values) -> Values:
    """Another name of the image token, and a list of one layer."""
    token = found.pop("image_token_index", None) or found.pop("image_token_id")
    return {**found, "image_token_id": token, "vision_feature_layer": [-2]}


def first_idefics3(found: Values) -> Values:
    """What its authors' own configuration held besides, and the tower under the whole's name."""
    text = found["text_config"] | {"use_resampler": False, "pixel_shuffle_factor": 2}
    del text["rope_parameters"]
    text |= {"rope_theta": 100000, "rope_scaling": None, "torch_dtype": "bfloat16"}
    more = {"model_type": "idefics3", "use_base_siglip": True, "size": {"longest_edge": 96}}
    return {
        **found,
        "text_config": text,
        "vision_config": {**found["vision_config"], **more},
        "vocab_size": 384,
    }


def first_gemma3(found: Values) -> Values:
    """Positions of two kinds under three names, the kinds of layers as a pattern."""
    text = found["text_config"]
    for name in ("rope_parameters", "layer_types", "dtype"):
        text.pop(name, None)
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1e6}
    text |= {"rope_local_base_freq": 1e4, "sliding_window_pattern": 2}
    return {**found, "eos_token_id": [1, 2]}


LAYOUTS: dict[str, tuple[str, Callable[[Path], Path], Callable[[Values], Values]]] = {
    "llava-1.5": (
        "llava",
        lambda folder: llava_folders.save_llava(folder, tie_word_embeddings=False),
        first_llava,
    ),
    "llava-newer": ("llava", llava_folders.save_llava, newer_llava),
    "llava-next": (
        "llava_next",
        lambda folder: llava_folders.save_llava_next(folder, vision_feature_layer=-2),
        first_llava_next,
    ),
    "idefics3": ("idefics3", composite_folders.save_idefics3, first_idefics3),
    "gemma3": ("gemma3", composite_folders.save_gemma3, first_gemma3),
    "internvl-6b": (
        "internvl",
        lambda folder: composite_folders.save_internvl(
            folder,
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "attention_bias": False,
                "use_qk_norm": True,
                "norm_type": "rms_norm",
                "use_mask_token": True,
            },
        ),
        dict,
    ),
}
"""Layout → `model_type`, what saves a folder, what its config.json becomes."""


def check_llava(folder: Path, name: str, ours: Any, processor: Any, scratch: Path) -> None:
    """The same ids, in one call and in two, and logits as its class."""
    own = AutoModelForImageTextToText.from_pretrained(folder).eval()
    theirs = own_processor(str(folder), name)
    for document in questions():
        mine, turns = processor.prompt(document), messages_in_files(document, scratch)
        inputs = theirs.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert inputs["input_ids"].tolist() == mine["input_ids"].tolist()
        torch.testing.assert_close(logits(ours, mine), logits(own, inputs), rtol=0, atol=1e-5)
        text = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        paths = [part["path"] for turn in turns for part in turn["content"] if "path" in part]
        images = [PillowImage.open(path) for path in paths]
        again = theirs(text=text, images=images or None)
        assert list(again["input_ids"][0]) == mine["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=needs_images if name == "idefics3" else ()) for name in LAYOUTS],
)
def test_a_published_layout_is_read_and_written(layout: str, tmp_path: Path) -> None:
    name, save, change = LAYOUTS[layout]
    folder, out = save(tmp_path / "theirs"), tmp_path / "out"
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    model, processor = load(folder)
    COMPOSITES[name].write(model, processor, out)
    for place in (folder, out):
        if name.startswith("llava"):
            check_llava(place, name, model, processor, tmp_path)
        else:
            check_read(name, place, model, processor)
    assert same_weights(model, load(out)[0])
    found = json.loads((out / "generation_config.json").read_text())
    assert found["pad_token_id"] >= 0
    assert 2 in found["eos_token_id"]
