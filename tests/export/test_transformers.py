"""Exported assemblies in a process without this package: same ids, same logits, same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.export.transformers import export
from mllm.models.assemble import assemble
from tests.export.outsider import ask, here, save_pictures
from tests.models.conftest import SMALL, open_gates
from tests.models.families import FAMILIES, save_family
from tests.models.native_folders import NATIVE

ENCODERS = (
    "aimv2",
    "clip",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_convnext",
    "dinov3_vit",
    "efficientnet_lite",
    "siglip",
)
CONNECTORS = (
    "average_pool",
    "c_abstractor",
    "linear",
    "mlp",
    "pixel_shuffle",
    "q_former",
    "resampler",
)
TILINGS: dict[str, dict[str, Any]] = {
    "any_resolution": {"tiling": "any_resolution"},
    "dynamic": {"tiling": "dynamic", "tiles": 4},
    "split": {"tiling": "split", "longest_edge": 64},
}


NATIVE_PARTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"connector": "patch_merger", "options": {"norm": "rms"}},
    "qwen2_vl": {"connector": "resampler", "encoder_options": {"max_pixels": 2000}},
    "qwen3_vl": {"connector": "q_former"},
    "siglip2_naflex": {"connector": "pixel_shuffle", "encoder_options": {"layer": -1}},
}
"""What each encoder of native resolution is exported with."""

CROSS = {"name": "cross_attention", "every": 1, "inner": 16}
STACK = {"name": "deepstack", "layers": [0, 1]}
FUSED: dict[str, dict[str, Any]] = {
    "cross_attention": {"fusion": CROSS},
    "cross_attention native": {
        "encoder": "siglip2_naflex",
        "fusion": {**CROSS, "only_immediate": False},
    },
    "cross_attention opt": {"language_model": "opt", "fusion": {**CROSS, "every": 2}},
    "cross_attention gemma2": {"language_model": "gemma2", "fusion": {**CROSS, "heads": 2}},
    "deepstack": {"fusion": STACK},
    "deepstack native": {
        "encoder": "qwen3_vl",
        "encoder_options": {"deepstack": True},
        "connector": "patch_merger",
        "options": {"levels": 3},
        "fusion": STACK,
    },
    "deepstack gpt_neox": {"language_model": "gpt_neox", "fusion": {**STACK, "layers": [1]}},
    **{
        f"{spec['name']} {name}": {"images": images, "fusion": spec}
        for name, images in TILINGS.items()
        for spec in (CROSS, STACK)
    },
}
"""Fusions that reach into the language model's layers."""


def section(folders: dict[str, Path], **parts: Any) -> dict[str, Any]:
    name = parts.get("encoder", "clip")
    encoder: dict[str, Any] = {"name": name, "path": folders.get(name)}
    if name == "pair":
        two = {one: {"name": one, "path": folders[one]} for one in ("siglip", "dinov2")}
        encoder = {"name": "pair", "first": two["siglip"], "second": two["dinov2"]}
    connector = parts.get("connector", "mlp")
    options = parts.get("options", SMALL.get(connector, {}))
    return {
        "encoder": {**encoder, **parts.get("encoder_options", {})},
        "connector": {"name": connector, **options},
        "language_model": {"path": parts.get("language_model", folders["llama"])},
        "images": parts.get("images", {}),
        "fusion": parts.get("fusion", {}),
    }


ASSEMBLIES: dict[str, dict[str, Any]] = {
    **{f"encoder {name}": {"encoder": name} for name in (*ENCODERS, "pair")},
    **{f"connector {name}": {"connector": name, "encoder": "siglip"} for name in CONNECTORS},
    **{f"native {name}": {"encoder": name, **parts} for name, parts in NATIVE_PARTS.items()},
    **{f"tiling {name}": {"images": images} for name, images in TILINGS.items()},
    **{f"fusion {name}": parts for name, parts in FUSED.items()},
    **{f"language model {name}": {"language_model": name} for name in FAMILIES},
}


def test_every_encoder_of_native_resolution_is_exported() -> None:
    assert set(NATIVE_PARTS) == set(NATIVE)


@pytest.fixture(scope="module")
def compared(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Assembly → (outside, here)."""
    root = tmp_path_factory.mktemp("exported")
    pictures = save_pictures(root)
    own, requests = {}, {}
    for name, parts in ASSEMBLIES.items():
        if family := parts.get("language_model"):
            folder = save_family(root / "families" / family, FAMILIES[family])
            parts = {**parts, "language_model": folder}
        torch.manual_seed(5)
        model, processor = assemble(section(folders, **parts))
        open_gates(model)
        export(model, processor, root / name)
        own[name] = here(model, processor, pictures)
        again = str(root / f"{name} again") if name in SAVED_AGAIN else ""
        requests[name] = {
            "folder": str(root / name),
            "images": pictures,
            "again": again,
            "adapter": None,
        }
    outside = ask(root, requests)
    return {name: (outside[name], own[name]) for name in ASSEMBLIES}


SAVED_AGAIN = (
    "encoder clip",
    "fusion cross_attention",
    "fusion deepstack any_resolution",
    "native qwen2_5_vl",
    "tiling any_resolution",
    "language model mixtral",
)


@pytest.mark.parametrize("name", ASSEMBLIES)
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
