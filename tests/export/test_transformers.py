"""Exported assemblies in a process without this package: same ids, same logits, same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.export.transformers import export
from mllm.models.assemble import assemble
from mllm.models.positions import is_spatial
from tests.export.outsider import ask, here, save_pictures
from tests.models.conftest import SMALL
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


def section(folders: dict[str, Path], **parts: Any) -> dict[str, Any]:
    name = parts.get("encoder", "clip")
    encoder: dict[str, Any] = {"name": name, "path": folders.get(name)}
    if name == "pair":
        two = {one: {"name": one, "path": folders[one]} for one in ("siglip", "dinov2")}
        encoder = {"name": "pair", "first": two["siglip"], "second": two["dinov2"]}
    connector = parts.get("connector", "mlp")
    return {
        "encoder": encoder,
        "connector": {"name": connector, **SMALL.get(connector, {})},
        "language_model": {"path": parts.get("language_model", folders["llama"])},
        "images": parts.get("images", {}),
    }


ASSEMBLIES: dict[str, dict[str, Any]] = {
    **{f"encoder {name}": {"encoder": name} for name in (*ENCODERS, "pair")},
    **{f"connector {name}": {"connector": name, "encoder": "siglip"} for name in CONNECTORS},
    **{f"tiling {name}": {"images": images} for name, images in TILINGS.items()},
    **{
        f"language model {name}": {"language_model": name}
        for name, config in FAMILIES.items()
        if not is_spatial(config)
    },
}


def test_native_resolution_and_its_positions_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    text = save_family(tmp_path / "text", FAMILIES["qwen2_vl_text"])
    vision = NATIVE["qwen2_vl"](tmp_path / "vision")
    for parts, match in (
        ({"language_model": text}, "qwen2_vl_text has positions in three directions"),
        ({"encoder": {"name": "qwen2_vl", "path": vision}}, "native resolution"),
        ({"connector": {"name": "q_former", **SMALL["q_former"], "text": True}}, "reads what is"),
    ):
        known: dict[str, Any] = section(folders)
        with pytest.raises(ValueError, match=match):
            export(*assemble({**known, **with_path(parts)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_path(parts: dict[str, Any]) -> dict[str, Any]:
    """Parts as a recipe names them."""
    return {name: {"path": one} if isinstance(one, Path) else one for name, one in parts.items()}


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


SAVED_AGAIN = ("encoder clip", "tiling any_resolution", "language model mixtral")


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
