"""Exported fusions that reach into the layers: caches, padding, training, half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_packing.document import Document, Image, Text
from mllm.export.transformers import export
from mllm.models.fusion.hooks import FORGETS_HOOKS
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.export.outsider import ask, save_pictures
from tests.models.conftest import SMALL, assemble, open_gates

CROSS = {"name": "cross_attention", "every": 1, "inner": 16}
ASSEMBLIES: dict[str, dict[str, Any]] = {
    "last image": {"fusion": CROSS},
    "all images": {"fusion": {**CROSS, "only_immediate": False}},
    "deepstack": {"fusion": {"name": "deepstack", "layers": [0, 1]}},
    "deepstack tiles": {
        "fusion": {"name": "deepstack"},
        "images": {"tiling": "dynamic", "tiles": 4},
    },
}
Found = dict[str, dict[str, Any]]


def batch(processor: Processor, pictures: list[str]) -> dict[str, torch.Tensor]:
    """The batch of fused_outside.py: no image, three of them, one."""
    one, two = (Image.open(Path(path)) for path in pictures)
    documents = [
        Document((Text("a red chair"),)),
        Document((one, Text("the cat "), two, one, Text("sat on"))),
        Document((Text("the "), two, Text("picture of a dog"))),
    ]
    return processor.prompts(documents)


@torch.no_grad()
def here(model: MultimodalModel, processor: Processor, pictures: list[str]) -> dict[str, Any]:
    both = batch(processor, pictures)
    text = processor.prompt(Document((Text("a red chair"),)))
    limits: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return {
        "ids": both["input_ids"],
        "mask": both["attention_mask"],
        "logits": model(**both).logits,
        "no image": model(**text).logits,
        "greedy": model.generate(**both, **limits),
        "several": model.generate(**both, **limits, num_beams=4, num_return_sequences=2),
    }


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Assembly → (outside, here, here in half precision)."""
    root = tmp_path_factory.mktemp("fused")
    pictures = save_pictures(root)
    own, requests = {}, {}
    for name, parts in ASSEMBLIES.items():
        section = {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp", **SMALL.get("mlp", {})},
            "language_model": {"path": folders["llama"]},
            **parts,
        }
        torch.manual_seed(5)
        model, processor = assemble(section)
        open_gates(model)
        export(model, processor, root / name)
        own[name] = here(model, processor, pictures)
        with torch.no_grad():
            half = model.to(torch.bfloat16)
            own[name]["half"] = half(**batch(processor, pictures)).logits
        requests[name] = {
            "folder": str(root / name),
            "images": pictures,
            "image_token_id": processor.image_token_id,
        }
    outside = ask(root, requests, "fused_outside.py")
    for name, result in outside.items():
        assert "error" not in result, (name, result["error"])
    return {name: (outside[name], own[name]) for name in ASSEMBLIES}


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_rows_with_and_without_images_are_the_model_s(name: str, found: dict[str, Any]) -> None:
    outside, own = found[name]
    assert torch.equal(outside["ids"], own["ids"])
    kept = own["mask"].bool()
    assert not kept.all()
    close(outside["logits"][kept], own["logits"][kept])
    close(outside["no image"], own["no image"])
    close(outside["logits"][0][kept[0]], own["no image"][0])
    close(outside["embedded"], own["no image"])
    assert (outside["half"].float() - own["half"].float())[kept].abs().max() < 0.1
    assert (outside["half"].float() - outside["logits"])[kept].abs().max() > 0


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_later_tokens_see_what_the_cache_has_seen(name: str, found: dict[str, Any]) -> None:
    outside, own = found[name]
    for key in ("greedy", "several"):
        assert torch.equal(outside[key], own[key]), key
    assert torch.equal(outside["greedy without cache"], own["greedy"])
    close(outside["after"], outside["whole"])
    assert (outside["after"][0] - outside["after"][2]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_every_weight_learns_and_checkpointing_changes_nothing(
    name: str, found: dict[str, Any]
) -> None:
    outside, _ = found[name]
    gradients, again = outside["gradients"], outside["gradients again"]
    parts = {key.split(".")[1] for key, one in gradients.items() if one.abs().max() > 0}
    fusion = {"fusion"} if "image" in name else set()
    assert parts == {"vision_tower", "connector", "language_model"} | fusion
    if FORGETS_HOOKS:
        assert "before 5.23" in again
        return
    assert gradients.keys() == again.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(again[key], gradient, msg=key)


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_a_fusion_on_another_device_computes_the_same(name: str, found: dict[str, Any]) -> None:
    outside, _ = found[name]
    close(outside["offloaded"], outside["logits"])
    assert ("GatedLayer" in outside["whole modules"]) == ("image" in name)


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_a_text_that_was_cut_is_refused(name: str, found: dict[str, Any]) -> None:
    outside, _ = found[name]
    assert "the processor and the model disagree" in outside["cut"]
