"""`--to transformers` of models that ask for more: positions, masks, questions, regions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from data_packing.document import Box
from mllm.export.transformers import export
from mllm.models.assemble import assemble, load
from mllm.models.chat_template import with_images
from tests.export.outsider import ask, here, save_pictures
from tests.models.composite_folders import save_gemma3
from tests.models.conftest import CHATML, SMALL, SMALL_FUSION, Parts, open_gates
from tests.models.families import FAMILIES, save_family
from tests.models.llava_folders import save_blip2
from tests.models.qwen_folders import save_qwen_vl

BOX: Box = (0.1, 0.0, 0.6, 0.5)
ASKED = ["\nWhat is this?", "\nWhich room?"]


WHOLES: dict[str, Callable[[Path], Path]] = {
    "blip2": save_blip2,
    "gemma3": save_gemma3,
    "qwen3_vl": partial(save_qwen_vl, name="qwen3_vl"),
    "qwen2_vl": partial(save_qwen_vl, name="qwen2_vl"),
    "qwen2_5_vl": partial(save_qwen_vl, name="qwen2_5_vl", tied=True),
}
ASSEMBLED: dict[str, dict[str, Any]] = {
    "squares of qwen2_vl": {"language_model": "qwen2_vl_text", "connector": "average_pool"},
    "tiles of qwen3_vl": {
        "language_model": "qwen3_vl_text",
        "images": {"tiling": "any_resolution"},
    },
    "cross-attention and positions": {
        "language_model": "qwen2_vl_text",
        "fusion": SMALL_FUSION["cross_attention"],
    },
    "questions and cross-attention": {
        "connector": "q_former",
        "more": {"text": True},
        "fusion": SMALL_FUSION["cross_attention"],
    },
    "levels, tiles and positions": {
        "language_model": "qwen3_vl_text",
        "images": {"tiling": "any_resolution"},
        "fusion": SMALL_FUSION["deepstack"],
    },
    "regions": {"images": {"regions": "feature"}},
    "regions of tiles with positions": {
        "language_model": "qwen2_vl_text",
        "images": {"tiling": "any_resolution", "regions": "feature"},
    },
    "regions in native resolution with positions": {
        "encoder": "qwen2_vl",
        "language_model": "qwen2_vl_text",
        "images": {"regions": "feature"},
    },
    "questions": {"connector": "q_former", "more": {"text": True}},
    "questions and tiles": {
        "connector": "q_former",
        "more": {"text": True},
        "images": {"tiling": "dynamic", "tiles": 4},
    },
    "questions in native resolution": {
        "encoder": "qwen2_vl",
        "connector": "q_former",
        "more": {"text": True},
    },
}


SAVED_AGAIN = ("gemma3", "blip2", "questions", "regions in native resolution with positions")


def assembled(folders: dict[str, Path], root: Path, parts: dict[str, Any]) -> Parts:
    encoder, connector = parts.get("encoder", "siglip"), parts.get("connector", "mlp")
    language_model = folders["llama"]
    if family := parts.get("language_model"):
        language_model = save_family(root / "families" / family, FAMILIES[family])
    torch.manual_seed(5)
    return assemble(
        {
            "encoder": {"name": encoder, "path": folders[encoder]},
            "connector": {"name": connector, **SMALL.get(connector, {}), **parts.get("more", {})},
            "language_model": {"path": language_model},
            "images": parts.get("images", {}),
            "fusion": parts.get("fusion", {}),
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is written."""
    return tmp_path_factory.mktemp("wholes")


@pytest.fixture(scope="module")
def compared(
    folders: dict[str, Path], root: Path
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Model → (outside, here)."""
    pictures = save_pictures(root)
    own, requests = {}, {}
    for name in (*WHOLES, *ASSEMBLED):
        if name in WHOLES:
            model, processor = load(WHOLES[name](root / f"{name} source"))
            if not processor.tokenizer.chat_template:
                processor.tokenizer.chat_template = CHATML
                with_images(processor.tokenizer, processor.image_token)
        else:
            model, processor = assembled(folders, root, ASSEMBLED[name])
            open_gates(model)
        model.generation_config.eos_token_id = None
        export(model, processor, root / name)
        box = BOX if "regions" in name else None
        own[name] = here(model, processor, pictures, box)
        more: dict[str, Any] = {"questions": ASKED} if "questions" in name else {}
        requests[name] = {
            "folder": str(root / name),
            "images": pictures,
            "again": str(root / f"{name} again") if name in SAVED_AGAIN else "",
            "adapter": None,
            "box": box,
            "step": True,
            "image": processor.template.image_text.asked,
            **more,
        }
    outside = ask(root, requests)
    return {name: (outside[name], own[name]) for name in requests}


def test_the_files_read_as_a_person_s(
    root: Path, compared: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    files = [root / name / "modeling_mllm.py" for name in compared]
    config = str(Path(__file__).parents[2] / "pyproject.toml")
    for command in (["check"], ["format", "--check", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", config]
        result = subprocess.run([*ruff, *map(str, files)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    for file in files:
        text = file.read_text()
        for word in ("mllm.", "data_packing", "type: ignore", "# end"):
            assert word not in text, file


@pytest.mark.parametrize("name", [*WHOLES, *ASSEMBLED])
def test_an_export_is_the_model(
    name: str, compared: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    outside, own = compared[name]
    assert "error" not in outside, outside["error"]
    for key in ("ids", "caption", "greedy", "beams"):
        assert torch.equal(outside[key], own[key]), key
    assert torch.equal(outside["ids by hand"], own["ids"])
    for key in ("logits", "hidden"):
        torch.testing.assert_close(outside[key], own[key], rtol=0, atol=1e-5)
    if name in SAVED_AGAIN:
        assert torch.equal(outside["logits again"], outside["logits"])
    torch.testing.assert_close(outside["stepped"], outside["whole"], rtol=0, atol=1e-5)
    assert torch.equal(outside["logits by hand"], outside["logits"])


def loaded(kind: Any, folder: Path, **options: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, **options)


def test_images_see_themselves_in_eager_attention_and_vllm_does_it_itself(
    root: Path, compared: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    folder = root / "gemma3"
    processor = loaded(AutoProcessor, folder)
    inputs = processor(text="<start_of_image>a", images=str(root / "0.png"), return_tensors="pt")
    with torch.no_grad():
        states = [
            loaded(AutoModel, folder, attn_implementation=name).eval()(**inputs)[0]
            for name in ("sdpa", "eager")
        ]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-5)
        model = loaded(AutoModel, folder).eval()
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="do not say which tokens are one image"):
            model(inputs_embeds=embeds)
    assert model.config.is_mm_prefix_lm
    with pytest.raises(ValueError, match="Flash"):
        loaded(AutoModel, folder, attn_implementation="flash_attention_2")


def test_what_is_told_of_images_must_fit(
    root: Path, compared: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    asks, regions = (loaded(AutoProcessor, root / name) for name in ("questions", "regions"))
    picture, templated = str(root / "0.png"), "<|im_start|>user\n<image>{}<|im_end|>\n"
    with pytest.raises(ValueError, match="reads what is asked about an image: hand over the"):
        asks(text=templated.format("a"), images=picture)
    with pytest.raises(ValueError, match="2 questions are given for 1 images"):
        asks(text=templated.format("a"), images=picture, questions=["a", "b"])
    with pytest.raises(ValueError, match="0 regions are given, the texts hold 1"):
        regions(text="<image>a<region>", images=picture)
    with pytest.raises(ValueError, match="before the first image of its text"):
        regions(text=["<image>", "<region>"], images=picture, regions=[BOX])
    with pytest.raises(ValueError, match="fractions of the image"):
        regions(text="<image><region>", images=picture, regions=[(0, 0, 50, 50)])


def test_a_batch_of_conversations(
    root: Path, compared: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    """Each has its own questions and regions, and rows are padded on the left."""
    image = {"type": "image", "path": str(root / "0.png")}
    said = {"type": "text", "text": "What is this?"}
    region = {"type": "text", "text": "", "box": list(BOX)}
    turns = [[{"role": "user", "content": content}] for content in ([image, said], [said])]
    for name, more in (("questions", said), ("regions", region)):
        processor = loaded(AutoProcessor, root / name)
        model = loaded(AutoModelForImageTextToText, root / name).eval()
        several = [*turns, [{"role": "user", "content": [image, said, more]}]]
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        batch = processor.apply_chat_template(several, padding=True, **options)
        with torch.no_grad():
            together = model(**batch).logits[:, -1]
            for row, one in zip(together, several, strict=True):
                alone = model(**processor.apply_chat_template(one, **options)).logits[0, -1]
                torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
