"""Backbones of timm: features, grids and folders that cannot be used. Without timm: the refusal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_packing.images import decode
from data_packing.pack import collate
from mllm.models.assemble import assemble, load
from mllm.models.encoders.timm_backbone import TimmEncoder
from tests.models.conftest import documents, picture
from tests.models.test_encoder_families import change, encode, odd_images
from tests.models.test_packed_equals_unpacked import assert_packed_is_unpacked

INSTALLED = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not INSTALLED, reason="timm is not installed")
IMAGE = picture(1).data

SMALL_VIT = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "drop_path_rate": 0.5,
    "patch_drop_rate": 0.5,
}
# architecture, its arguments, side, cells of levels -1 and -2
BACKBONES: dict[str, tuple[str, dict[str, Any], int, tuple[int, int]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL_VIT, 32, (4, 4)),
    "resnet": ("resnet10t", {}, 64, (2, 4)),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 16]}, 64, (2, 4)),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]},
        64,
        (8, 16),
    ),
    "eva": (
        "eva02_tiny_patch14_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
        32,
        (4, 4),
    ),
}


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A folder as timm writes it, its weights left out."""
    architecture, args, side, _ = BACKBONES[name]
    folder.mkdir(parents=True, exist_ok=True)
    seen = {
        "input_size": [3, side, side],
        "interpolation": "bicubic",
        "crop_pct": 0.8,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    config = {
        "architecture": architecture,
        "num_classes": 5,
        "model_args": args,
        "pretrained_cfg": {**seen, **changes},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def whole(name: str) -> Any:
    """timm's own model, with its classifier."""
    import timm

    torch.manual_seed(3)
    architecture, args, _, _ = BACKBONES[name]
    model = timm.create_model(architecture, num_classes=5, **args)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return model.eval()


def write_with_weights(folder: Path, name: str) -> Path:
    write(folder, name)
    save_file(whole(name).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.skipif(INSTALLED, reason="timm is installed")
def test_without_the_package_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a package: pip install timm") as refused:
        TimmEncoder.from_folder(write(tmp_path, "resnet"))
    assert "\n" not in str(refused.value)


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as error:
        TimmEncoder.from_folder(folder, **options)
    assert "\n" not in str(error.value)


def test_configurations_that_say_too_little(folders: dict[str, Path], tmp_path: Path) -> None:
    refused(folders["clip"], "holds a 'clip_vision_model' model, not one of timm")
    for values, match in (
        ({"input_size": None}, "gives no input_size"),
        ({"input_size": [3, 64, 32]}, "only squares"),
        ({"input_size": [1, 64, 64]}, "has 1 channels"),
        ({"mean": None}, "gives no mean"),
        ({"std": [0, 1, 1]}, "divides by zero"),
        ({"crop_pct": None}, "gives no crop_pct"),
        ({"interpolation": "random"}, "unknown interpolation"),
        ({"crop_mode": "centre"}, "did you mean 'center'"),
        ({"crop_mode": "squash"}, "crop_mode squash with crop_pct 0.8"),
    ):
        refused(write(tmp_path, "resnet", **values), match)
    refused(write(tmp_path, "resnet"), "layer must be a whole number below 0", layer=0)


@needs_timm
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", BACKBONES)
def test_features_are_those_of_timm(tmp_path: Path, name: str, layer: int) -> None:
    folder = write_with_weights(tmp_path, name)
    encoder = TimmEncoder.from_folder(folder, layer=layer)
    cells = BACKBONES[name][3][-layer - 1]
    assert encoder.grid(7, 9) == (cells, cells)
    image = decode(IMAGE)
    found = encode(encoder.train(), image)  # no random skips
    if name != "resnet":  # a net that trains keeps its batch norm in eval mode too
        assert encoder.train().training
    seen = torch.from_numpy(encoder.preprocess(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.mean, encoder.std))
    own = whole(name)
    maps = own.forward_intermediates((seen - mean) / std, norm=layer == -1, intermediates_only=True)
    wanted = maps[layer].flatten(2).transpose(1, 2)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    if layer == -1 and name == "vit":
        tokens = own.forward_features((seen - mean) / std)[0, 1:]
        torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)
    found.square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    assert not any(n.startswith(("net.head", "net.fc")) for n, _ in encoder.named_parameters())
    sizes = [sum(p.numel() for p in one.parameters()) for one in (encoder, own)]
    assert sizes[0] < sizes[1]


@needs_timm
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assembled_saved_and_loaded(
    folders: dict[str, Path], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    section = {
        "encoder": {"name": "timm", "path": write_with_weights(tmp_path / "timm", name)},
        "connector": {"name": "average_pool", "visual_tokens": 4},
        "language_model": {"path": folders["llama"]},
    }
    model, processor = assemble(section, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    pack = collate([processor.encode(one) for one in documents()], 0)
    with torch.no_grad():
        wanted = model.hidden_states(
            pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
        )
        found = again.hidden_states(
            pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
        )
    assert wanted.isfinite().all()
    assert torch.equal(found, wanted)
    if dtype == torch.float32:
        model.train()
        assert_packed_is_unpacked(model, processor)


@needs_timm
def test_every_kind_of_image(tmp_path: Path) -> None:
    folder = write_with_weights(tmp_path, "convnext")
    for rule in (None, "squash", "pad"):
        encoder = TimmEncoder.from_folder(folder, **({"resize": rule} if rule else {})).eval()
        for what, data in odd_images().items():
            features = encode(encoder, decode(data))
            assert features.shape == (4, encoder.width), what
            assert features.isfinite().all(), what


@needs_timm
def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    folder = write_with_weights(tmp_path, "resnet")
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "conv1.0.weight"}, file)
    refused(folder, "1 weights of the encoder are missing, conv1.0.weight first")
    save_file({**weights, "bn1.weight": torch.zeros(3)}, file)
    refused(folder, "1 weights of the encoder have another shape than resnet10t, bn1.weight first")
    file.write_bytes(file.read_bytes()[:99])
    refused(folder, "damaged or cut short")
    file.unlink()
    refused(folder, "encoder weights")
    refused(folder, "has fewer levels", layer=-9)
    refused(write(tmp_path, "vit", input_size=[3, 64, 64]), "gives no features .* of 64 pixels")
    change(folder / "config.json", architecture="resnett18")
    refused(folder, "unknown architecture of timm 'resnett18'; did you mean 'resnet18'")
    write(tmp_path, "resnet")
    change(folder / "config.json", architecture="hrnet_w18_small", model_args={})
    refused(folder, "do not reach level -1 and could not learn")
