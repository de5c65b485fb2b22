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

from data_packing.document import Box
from mllm.export.transformers import export
from mllm.models.assemble import assemble, load
from mllm.models.chat_template import with_images
from tests.export.outsider import ask, here, save_pictures
from tests.models.composite_folders import save_gemma3
from tests.models.conftest import CHATML, SMALL, Parts
from tests.models.families import FAMILIES, save_family
from tests.models.llava_folders import save_blip2
from tests.models.qwen_folders import save_qwen_vl

BOX: Box = (0.1, 0.0, 0.6, 0.5)
ASKED = ["\nWhat is this?", "\nWhich room?"]


WHOLES: dict[str, Callable[[Path], Path]] = {
    "blip2": save_blip2,
    "gemma3": save_gemma3,
    "qwen2_vl": partial(save_qwen_vl, name="qwen2_vl"),
    "qwen2_5_vl": partial(save_qwen_vl, name="qwen2_5_vl", tied=True),
}
ASSEMBLED: dict[str, dict[str, Any]] = {
    "squares of qwen2_vl": {"language_model": "qwen2_vl_text", "connector": "average_pool"},
    "tiles of qwen3_vl": {
        "language_model": "qwen3_vl_text",
        "images": {"tiling": "any_resolution"},
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
        model.generation_config.eos_token_id = None
        export(model, processor, root / name)
        box = BOX if "regions" in name else None
        own[name] = here(model, processor, pictures, box)
        more: dict[str, Any] = {"questions": ASKED} if "questions" in name else {}
        requests[name] = {
            "folder": str(root / name),
            "images": pictures,
            "again": str(root / f"{name} again"),
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
    assert torch.equal(outside["logits again"], outside["logits"])
    torch.testing.assert_close(outside["stepped"], outside["whole"], rtol=0, atol=1e-5)
    assert torch.equal(outside["logits by hand"], outside["logits"])
