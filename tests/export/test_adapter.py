"""`--adapter`: taken out of merged weights, and put back by PEFT in a process without `mllm`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, Idefics3ImageProcessorPil, PreTrainedConfig

from data_packing.document import Document
from mllm.export.adapter import Adapter
from mllm.export.command import write
from mllm.models.assemble import assemble, load
from mllm.models.composites import COMPOSITES
from tests.export.outsider import ask, here, save_pictures
from tests.export.stages import adapted, save_stage
from tests.models import composite_folders, llava_folders
from tests.models.composite_checks import CLOSE, ask_classes, messages_in_files
from tests.models.conftest import Parts, picture
from tests.models.families import FAMILIES, save_family
from tests.models.own_processors import usable
from tests.models.qwen_folders import KINDS, save_qwen_vl

GPT2: dict[str, Any] = FAMILIES["gpt2"].to_diff_dict()
LANGUAGE_MODELS: dict[str, PreTrainedConfig] = {
    "conv1d": FAMILIES["gpt2"],
    "square conv1d": GPT2Config(**{**GPT2, "n_inner": FAMILIES["gpt2"].hidden_size}),
}
TRAIN: dict[str, dict[str, Any]] = {
    "conv1d": {"language_model": adapted()},
    "square conv1d": {"language_model": adapted(targets=["c_proj", "c_fc"])},
    "other modules too": {
        "encoder": adapted(),
        "connector": adapted("dora"),
        "language_model": adapted(),
    },
    "a part of its own": {
        "language_model": adapted(),
        "language_model.model.layers.1.mlp": adapted(rank=3),
    },
    "qlora": {"language_model": adapted("qlora")},
}
"""Stage → what its recipe says of training."""

SAVERS: dict[str, Callable[[Path], Path]] = {
    "blip-2": llava_folders.save_blip2,
    "blip-2 of gpt2": partial(
        llava_folders.save_blip2, text_config=GPT2Config(**{**GPT2, "vocab_size": 320})
    ),
    "gemma3": composite_folders.save_gemma3,
    "idefics3": composite_folders.save_idefics3,
    "internvl": composite_folders.save_internvl,
    "llava": llava_folders.save_llava,
    "llava_next": llava_folders.save_llava_next,
    "llava_onevision": llava_folders.save_llava_onevision,
    "smolvlm": partial(composite_folders.save_idefics3, name="smolvlm"),
    **{name: partial(save_qwen_vl, name=name) for name in KINDS},
}
"""Begins with a `model_type` → how a folder of the class is made."""


def language_weights(parts: Parts) -> dict[str, Tensor]:
    return {name: w.clone() for name, w in parts[0].language_model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


def assert_only_what_is_carried(folder: Path) -> None:
    """The configuration names the layers that there are adapters for, and no others."""
    targets = LoraConfig.from_pretrained(folder / "adapter").target_modules
    assert isinstance(targets, str)
    weights = load_file(folder / "model.safetensors")
    named = {n.removesuffix(".weight") for n in weights if n.endswith(".weight")}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    carried = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in adapter}
    assert {name for name in named if re.fullmatch(targets, name)} == carried


def untrained(folders: dict[str, Path], root: Path, name: str) -> Parts:
    language_model = folders["llama"]
    if name in LANGUAGE_MODELS:
        language_model = save_family(root / f"{name} lm", LANGUAGE_MODELS[name])
    torch.manual_seed(5)
    return assemble(
        {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp"},
            "language_model": {"path": language_model},
        }
    )


@pytest.fixture(scope="module")
def stages(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages of TRAIN."""
    root = tmp_path_factory.mktemp("stages")
    for name, train in TRAIN.items():
        save_stage(untrained(folders, root, name), root / name, train)
    return root


@pytest.mark.parametrize("name", [n for n in TRAIN if n not in ("qlora", "a part of its own")])
def test_what_is_left_is_what_was_there_before(
    folders: dict[str, Path], stages: Path, name: str, tmp_path: Path
) -> None:
    before = language_weights(untrained(folders, tmp_path, name))
    parts = load(stages / name)
    merged = language_weights(parts)
    assert max((merged[n] - w).abs().max() for n, w in before.items()) > 1e-2
    Adapter.read(stages / name / "lora").take_out(parts[0])
    assert_same(language_weights(parts), before)


def test_put_back_it_is_the_stage(stages: Path, tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path)
    requests = {}
    for name in TRAIN:
        write(stages / name, "transformers", tmp_path / name, adapter=True)
        adapter = str(tmp_path / name / "adapter")
        assert_only_what_is_carried(tmp_path / name)
        requests[name] = {"folder": str(tmp_path / name), "adapter": adapter}
    common = {"images": pictures, "again": ""}
    for name, found in ask(tmp_path, {n: r | common for n, r in requests.items()}).items():
        assert "error" not in found, found["error"]
        own = here(*load(stages / name), pictures)["logits"]
        assert (found["logits"] - own).abs().max() > 1e-2
        torch.testing.assert_close(found["adapted"], own, rtol=0, atol=1e-5)


def test_an_adapter_that_is_not_the_language_model_s_is_refused(
    folders: dict[str, Path], stages: Path, tmp_path: Path
) -> None:
    train = {"encoder": adapted(), "connector": adapted("dora")}
    stage = save_stage(untrained(folders, tmp_path, "llama"), tmp_path / "stage", train)
    with pytest.raises(ValueError, match=r"\(lora_connector, lora_encoder\), which are always"):
        write(stage, "transformers", tmp_path / "out", adapter=True)
    found = Adapter.read(stages / "square conv1d" / "lora")
    model = load(stages / "conv1d")[0]
    with pytest.raises(ValueError, match=r"c_fc is for weights of shape \[32, 32\], .* \[32, "):
        found.take_out(model)


@pytest.fixture(scope="module")
def classes(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """Where everything lies; the weights before; what a process without this project found."""
    root = tmp_path_factory.mktemp("classes")
    picture_file = root / "picture.png"
    picture_file.write_bytes(picture(3).data)
    before, jobs = {}, {}
    for name, save in SAVERS.items():
        parts = load(save(root / f"{name} source"))
        before[name] = language_weights(copy.deepcopy(parts))
        stage = save_stage(parts, root / f"{name} stage")
        kind = name.split()[0]
        write(stage, COMPOSITES[kind].name, root / name, adapter=True)
        asked: dict[str, Any] = {"messages": messages_in_files(question(), root)}
        if kind == "blip-2":
            asked = {"image": str(picture_file), "text": "the cat sat"}
        if kind not in ("idefics3", "smolvlm") or usable(Idefics3ImageProcessorPil):
            jobs[name] = (root / name, kind, [asked])
    return root, before, ask_classes(jobs, root, adapter=True)


def question() -> Document:
    return Document.conversation([("user", [picture(3), "\nWhat is this?"])])


def test_every_class_is_tried() -> None:
    assert {name.split()[0] for name in SAVERS} == set(COMPOSITES)


@pytest.mark.parametrize("name", SAVERS)
@torch.no_grad()
def test_a_class_of_transformers_takes_it_back(name: str, classes: Any) -> None:
    root, before, found = classes
    assert_same(language_weights(load(root / name)), before[name])
    if name not in found:
        pytest.skip("its image processor needs torchvision here")
    model, processor = load(root / f"{name} stage")
    document = question()
    if name.startswith("blip-2"):
        document = Document.caption(picture(3), "the cat sat")
    inputs = processor.prompt(document)
    (there,) = found[name]["documents"]
    assert there["ids"].tolist() == inputs["input_ids"][0].tolist()
    torch.testing.assert_close(there["logits"], model(**inputs).logits[0], **CLOSE)
    apart = load(root / name)[0]
    assert (there["logits"] - apart(**inputs).logits[0]).abs().max() > 1e-2
