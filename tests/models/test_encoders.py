"""Encoders: geometry, features of the right layer, and folders that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPImageProcessor, CLIPVisionModel, SiglipVisionModel

from data_packing.images import decode
from data_packing.pack import join_views
from mllm.models.encoders import ENCODERS, WITHOUT_PATH
from mllm.models.encoders.efficientnet_lite import (
    EfficientNetLiteEncoder,
    convert_package_weights,
)
from mllm.models.geometry import ImageGeometry
from mllm.training.pack_cost import patch_cost
from tests.models.conftest import picture, save_efficientnet

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("name", "cells"), [("clip", 4), ("siglip", 4), ("efficientnet_lite", 7)])
def test_features_have_the_promised_shape(folders: dict[str, Path], name: str, cells: int) -> None:
    encoder = ENCODERS[name].from_folder(folders[name])
    assert encoder.grid(100, 50) == (cells, cells)
    assert encoder.patches(100, 50) == cells**2
    image = encoder.preprocess(decode(picture(1).data))
    assert image.shape == (encoder.image_size, encoder.image_size, 3)
    assert image.dtype == np.uint8
    features = encoder(*join_views([image, image]))
    assert features.shape == (2 * cells**2, encoder.width)
    torch.testing.assert_close(*features.split(cells**2))
    assert encoder.grids([(encoder.image_size, encoder.image_size)] * 2) == [(cells, cells)] * 2
    assert all(p.requires_grad for p in encoder.parameters())
    features.square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - {*WITHOUT_PATH, "timm"}))
def test_a_patch_costs_what_a_forward_pass_multiplies(folders: dict[str, Path], name: str) -> None:
    """The cost is counted without data; here is the same with it."""
    encoder = ENCODERS[name].from_folder(folders[name]).requires_grad_(False)
    pixels, sizes = encoder.blank()
    every = sdpa_kernel(SDPBackend.MATH)  # the products of others are not counted
    with torch.no_grad(), every, FlopCounterMode(display=False) as counter:
        encoder(pixels, sizes)
    patches = encoder.patches(*sizes[0].tolist())
    assert 0 < patch_cost(encoder) == counter.get_total_flops() / 2 / patches


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize(
    ("name", "kind"), [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel)]
)
def test_the_layer_is_the_one_of_the_whole_model(
    folders: dict[str, Path], name: str, kind: type[CLIPVisionModel], layer: int
) -> None:
    encoder = ENCODERS[name].from_folder(folders[name], layer=layer)
    pixels, sizes = join_views([encoder.preprocess(decode(picture(1).data))])
    views = pixels.view(1, encoder.image_size, encoder.image_size, 3)
    images = (views / 255 - torch.tensor(encoder.mean)) / torch.tensor(encoder.std)
    whole = kind.from_pretrained(folders[name])
    states = whole(images.permute(0, 3, 1, 2), output_hidden_states=True)
    wanted = states.hidden_states[layer][:, -16:]
    if name == "siglip" and layer == -1:
        wanted = states.last_hidden_state
    torch.testing.assert_close(encoder(pixels, sizes), wanted.flatten(0, 1), rtol=0, atol=1e-5)


def test_clip_pixels_are_those_of_its_own_preprocessor(folders: dict[str, Path]) -> None:
    encoder = ENCODERS["clip"].from_folder(folders["clip"])
    own = CLIPImageProcessor.from_pretrained(folders["clip"], do_normalize=False, do_rescale=False)
    for height, width in ((40, 56), (300, 111), (64, 64), (32, 32), (35, 500)):
        pixels = decode(picture(height, height, width).data)
        wanted = own(PillowImage.fromarray(pixels), return_tensors="np")["pixel_values"][0]
        found = encoder.preprocess(pixels).astype(float)
        assert np.abs(found - wanted.transpose(1, 2, 0)).mean() < 1.5, (height, width)


def test_resize_rules() -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = 10, 100, 200
    made = {
        rule: ImageGeometry(12, 3, HALF, HALF, resize=rule, resampling="nearest").preprocess(wide)
        for rule in ("squash", "crop", "pad")
    }
    assert sorted(set(made["squash"].ravel())) == [10, 100, 200]
    assert set(made["crop"].ravel()) == {100}
    assert made["pad"][0, 0].tolist() == [128, 128, 128]
    assert sorted(set(made["pad"][6].ravel())) == [10, 100, 200]
    larger = ImageGeometry(12, 3, HALF, HALF, "crop", "nearest", short_edge=20).preprocess(wide)
    assert set(larger.ravel()) == {100}
    square = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for rule in made:
        same = ImageGeometry(12, 3, HALF, HALF, resize=rule).preprocess(square)
        np.testing.assert_array_equal(same, square)
    for bad in ({"resize": "stretch"}, {"resampling": "box"}, {"short_edge": 5}):
        with pytest.raises(ValueError, match=r"unknown|below"):
            ImageGeometry(12, 3, HALF, HALF, **bad)


def test_options_change_the_rule(folders: dict[str, Path]) -> None:
    squares = (name for name, kind in ENCODERS.items() if "resize" in kind.OPTIONS)
    for name in (each for each in squares if each in folders):
        encoder = ENCODERS[name].from_folder(folders[name], resize="pad")
        assert encoder.square.resize == "pad"
        with pytest.raises(ValueError, match="did you mean 'resize'"):
            ENCODERS[name].from_folder(folders[name], resise="pad")
    with pytest.raises(ValueError, match="3 layers"):
        ENCODERS["clip"].from_folder(folders["clip"], layer=-4)
    with pytest.raises(ValueError, match="layer must be a whole number below 0, got 2"):
        ENCODERS["clip"].from_folder(folders["clip"], layer=2)


def test_the_wrong_family_is_named(folders: dict[str, Path]) -> None:
    for name, other in (("clip", "siglip"), ("siglip", "clip"), ("efficientnet_lite", "clip")):
        with pytest.raises(ValueError, match="holds a '"):
            ENCODERS[name].from_folder(folders[other])
    with pytest.raises(ValueError, match="holds a 'llama' model"):
        ENCODERS["clip"].from_folder(folders["llama"])


def test_damaged_encoder_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in (each for each in ENCODERS if each in folders):
        folder = tmp_path / name
        shutil.copytree(folders[name], folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-200])
        with pytest.raises(ValueError, match="damaged or cut short") as refused:
            ENCODERS[name].from_folder(folder)
        assert "\n" not in str(refused.value)
        weights.unlink()
        with pytest.raises(ValueError, match=name):
            ENCODERS[name].from_folder(folder)
        (folder / "preprocessor_config.json").unlink()
        with pytest.raises(ValueError, match="preprocessor_config"):
            ENCODERS[name].from_folder(folder)
    missing = tmp_path / "efficientnet_lite"
    (missing / "config.json").write_text(
        json.dumps({"model_type": "efficientnet_lite", "variant": "efficientnet-lite9"})
    )
    with pytest.raises(ValueError, match="did you mean 'efficientnet-lite"):
        ENCODERS["efficientnet_lite"].from_folder(missing)


def test_converting_the_package_keeps_the_features(tmp_path: Path) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    folder = save_efficientnet(tmp_path / "lite0")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    torch.manual_seed(4)
    package = EfficientNet.from_name("efficientnet-lite0").eval()
    encoder = EfficientNetLiteEncoder.from_folder(folder).eval()
    pixels, sizes = join_views([encoder.preprocess(decode(picture(1).data))])
    views = pixels.view(1, encoder.image_size, encoder.image_size, 3)
    images = (views / 255 - torch.tensor(encoder.mean)) / torch.tensor(encoder.std)
    with torch.no_grad():
        wanted = package.extract_features(images.permute(0, 3, 1, 2))
        found = encoder(pixels, sizes)
    torch.testing.assert_close(found, wanted[0].flatten(1).T, rtol=1e-4, atol=1e-4)


def test_a_pickle_that_runs_code_is_not_converted(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "harm"), "w"))  # type: ignore[return-value]

    bad = tmp_path / "weights.pth"
    torch.save({"_conv_stem.weight": Harmful()}, bad)
    with pytest.raises(ValueError, match="not a file of weights") as refused:
        convert_package_weights(bad, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="did you mean"):
        convert_package_weights(bad, tmp_path / "out", "efficientnet-lit0")
