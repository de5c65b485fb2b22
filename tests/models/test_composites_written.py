"""What every class of transformers is written from: language models, batches, ends of turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Idefics3ImageProcessorPil,
    OPTConfig,
    PreTrainedConfig,
)

from data_packing.document import Document
from mllm.models.assemble import assemble, load
from mllm.models.composites import COMPOSITES
from mllm.models.modeling import MultimodalModel
from tests.models import composite_folders, llava_folders
from tests.models.composite_checks import conversations, load_alone
from tests.models.conftest import Parts, llama_config, make_tokenizer, picture
from tests.models.families import FAMILIES, SMALL, save_family
from tests.models.own_processors import usable
from tests.models.qwen_folders import KINDS, save_qwen_vl

OPT = OPTConfig(**SMALL, ffn_dim=64, init_std=0.2, dropout=0.0, word_embed_proj_dim=32)
LANGUAGE_MODELS: dict[str, PreTrainedConfig] = {
    "opt": OPT,
    "opt_narrow": FAMILIES["opt"],
    **{name: FAMILIES[name] for name in ("gpt2", "qwen3_moe", "gemma3_text")},
    **{name: FAMILIES[name] for name in ("phi", "granite", "qwen2_vl_text")},
}
SHUFFLE = {"name": "pixel_shuffle", "layers": 1, "bias": False}
PROJECTOR = {"name": "mlp", "norm": False}
FITTING: dict[str, dict[str, Any]] = {
    "blip-2": {
        "encoder": {"name": "blip2"},
        "connector": {"name": "q_former", "visual_tokens": 3, "hidden": 8, "heads": 2, "depth": 2},
    },
    "idefics3": {
        "encoder": {"name": "siglip", "layer": -1},
        "connector": SHUFFLE,
        "images": {"tiling": "split", "longest_edge": 64},
    },
    "internvl": {
        "encoder": {"name": "internvl"},
        "connector": {"name": "pixel_shuffle"},
        "images": {"tiling": "dynamic", "tiles": 2},
    },
    "llava": {"encoder": {"name": "clip"}, "connector": PROJECTOR},
    "llava_next": {
        "encoder": {"name": "clip"},
        "connector": PROJECTOR,
        "images": {"tiling": "any_resolution", "tiles": 2},
    },
    "llava_onevision": {
        "encoder": {"name": "siglip"},
        "connector": PROJECTOR,
        "images": {"tiling": "any_resolution", "tiles": 2},
    },
}
FITTING["smolvlm"] = FITTING["idefics3"]
"""`model_type` → parts that the class has a place for."""

REFUSED = {
    "opt_narrow": "its embedding is 16 wide and its layers 32",
    "phi": "its output layer has a bias",
    "granite": "scales or caps its logits",
    "qwen2_vl_text": "its positions have three directions",
}
"""Language model → why no class holds it; BLIP-2 holds a whole language model."""


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("language_models")
    return {name: save_family(root / name, config) for name, config in LANGUAGE_MODELS.items()}


def made(folders: dict[str, Path], name: str, language_model: Path) -> Parts:
    """A model that was assembled here, for the class."""
    torch.manual_seed(5)
    parts = FITTING[name]
    encoder = {**parts["encoder"], "path": folders[parts["encoder"]["name"]]}
    return assemble({**parts, "encoder": encoder, "language_model": {"path": language_model}})


def their_inputs(model: MultimodalModel, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Our inputs of one square image as the class takes them."""
    squares = model.encoder.squares(inputs["pixels"], inputs["sizes"])
    pixels = model.encoder.normalised(squares).permute(0, 3, 1, 2)
    found = {"input_ids": inputs["input_ids"], "pixel_values": pixels}
    if name in ("idefics3", "smolvlm"):
        found["pixel_values"] = pixels[None]
    if name in ("llava_next", "llava_onevision"):
        found |= {"pixel_values": pixels[None], "image_sizes": torch.tensor([[32, 32]])}
    return found


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("name", FITTING)
def test_a_language_model_is_written_whole_or_refused(
    folders: dict[str, Path],
    language_models: dict[str, Path],
    name: str,
    language_model: str,
    tmp_path: Path,
) -> None:
    model, processor = made(folders, name, language_models[language_model])
    why = REFUSED.get(language_model)
    if why and (name != "blip-2" or language_model in ("opt_narrow", "qwen2_vl_text")):
        with pytest.raises(ValueError, match=why) as caught:
            COMPOSITES[name].write(model, processor, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        return
    COMPOSITES[name].write(model, processor, tmp_path / "out")
    own: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    asked = processor.prompt(
        Document.conversation([("user", [picture(4, 32, 32), "What is this?"])])
    )
    with torch.no_grad():
        wanted = model(**asked).logits
        found = own(**their_inputs(model, name, asked)).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        again = load(tmp_path / "out", torch.float32)[0]
        torch.testing.assert_close(again(**asked).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FITTING)
def test_other_parts_are_refused_in_one_line(
    build: Callable[..., Parts], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="average_pool|clip") as caught:
        COMPOSITES[name].write(*build("clip", "average_pool"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every class as one finds it on disk."""
    root = tmp_path_factory.mktemp("theirs")
    savers: dict[str, Callable[[Path], Path]] = {
        "blip-2": llava_folders.save_blip2,
        "gemma3": composite_folders.save_gemma3,
        "idefics3": composite_folders.save_idefics3,
        "internvl": composite_folders.save_internvl,
        "llava": llava_folders.save_llava,
        "llava_next": llava_folders.save_llava_next,
        "llava_onevision": llava_folders.save_llava_onevision,
        "smolvlm": lambda folder: composite_folders.save_idefics3(folder, "smolvlm"),
    }
    for name in KINDS:
        savers[name] = lambda folder: save_qwen_vl(folder, folder.name)
    assert savers.keys() == COMPOSITES.keys()
    return {name: save(root / name) for name, save in savers.items()}


def without_padding(processor: Any) -> None:
    """As tokenizers of Llama are found: rows end with padding, and there is no token for it."""
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.init_kwargs.pop("padding_side", None)
    processor.tokenizer.pad_token = None


def test_rows_of_a_batch_are_answered_as_alone(
    theirs: dict[str, Path],
    folders: dict[str, Path],
    language_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    written = {}
    images = usable(Idefics3ImageProcessorPil)  # from transformers 5.18 on without torchvision
    usual = {name for name in theirs if images or name not in ("idefics3", "smolvlm")}
    for name in usual:
        folder = theirs[name]
        chats = name != "blip-2"  # a folder of its has no chat template
        model, processor = load(folder) if chats else made(folders, name, folders["llama"])
        without_padding(processor)
        COMPOSITES[name].write(model, processor, tmp_path / name)
        written[name] = (tmp_path / name, name)
    found = load_alone(written, tmp_path, together=2)
    for name in written:
        ends = json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"]
        for number, row in enumerate(found[name]["together"].tolist()):
            alone = found[name]["documents"][number]["new"].tolist()
            assert row[: len(alone)] == alone, name
            assert len(row) == len(alone) or alone[-1] in ends, name


@pytest.mark.parametrize("name", FITTING)
def test_generation_ends_where_the_chat_template_ends_a_turn(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The tokenizer and the language model end texts with another token."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    config = llama_config(eos_token_id=0, pad_token_id=-1)
    save_family(tmp_path / "lm", config)
    tokenizer.save_pretrained(tmp_path / "lm")
    model, processor = made(folders, name, tmp_path / "lm")
    COMPOSITES[name].write(model, processor, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert found["pad_token_id"] == 0
    samples = processor.encode(conversations()[0])
    learned = samples.labels[samples.labels >= 0]
    assert learned[-1] in found["eos_token_id"]
    again = load(tmp_path / "out")[0].generation_config
    assert again.eos_token_id == found["eos_token_id"]


def test_a_class_is_looked_at_without_its_weights(theirs: dict[str, Path]) -> None:
    for name, folder in theirs.items():
        whole, processor = load(folder)
        for file in folder.glob("*.safetensors*"):
            file.rename(file.with_suffix(".hidden"))
        try:
            model, same = load(folder, weights=False)
        finally:
            for file in folder.glob("*.hidden"):
                file.rename(file.with_suffix(".safetensors"))
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
        shapes = {key: (w.shape, w.dtype) for key, w in model.state_dict().items()}
        assert shapes == {key: (w.shape, w.dtype) for key, w in whole.state_dict().items()}, name
        assert sum(w.numel() for w in model.parameters()) == sum(
            w.numel() for w in whole.parameters()
        )
        assert same.fingerprint == processor.fingerprint
        assert model.generation_config.eos_token_id == whole.generation_config.eos_token_id
