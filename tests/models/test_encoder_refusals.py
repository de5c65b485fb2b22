"""Folders that cannot be used: every family says so in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_packing.images import decode
from mllm.models.encoders import ENCODERS
from tests.models.test_encoder_families import IMAGE, MODELS, change, encode, refused


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder to spoil: copy("dinov2")."""

    def made(name: str) -> Path:
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[name], folder)
        return folder

    return made


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_do_not_fit(copy: Callable[[str], Path], name: str) -> None:
    folder = copy(name)
    file = folder / "model.safetensors"
    weights = load_file(file)
    key = max(weights, key=lambda one: weights[one].ndim)
    save_file({k: v for k, v in weights.items() if k != key}, file, {"format": "pt"})
    refused(name, folder, "1 weights of the encoder are missing")
    save_file({**weights, key: weights[key][:-1].contiguous()}, file, {"format": "pt"})
    refused(name, folder, "1 weights of the encoder have another shape")
    save_file({"other": torch.zeros(2)}, file, {"format": "pt"})
    refused(name, folder, "weights of the encoder are missing")
    file.write_bytes(file.read_bytes()[:20])
    refused(name, folder, "damaged or cut short")
    file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(name, folder, "safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_the_wrong_family(folders: dict[str, Path], name: str) -> None:
    for other in MODELS:
        if other != name:
            refused(name, folders[other], f"holds a .* model, not {ENCODERS[name].__name__}")


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_not_there(folders: dict[str, Path], name: str) -> None:
    refused(name, folders[name], "the encoder has 3 layers", layer=-4)
    for layer in (0, 2, 1.0, True, "last"):
        refused(name, folders[name], "layer must be a whole number below 0", layer=layer)


SPOILT: list[tuple[dict[str, Any], str]] = [
    ({"image_mean": ...}, "has image_mean: None; three numbers"),
    ({"image_std": [0.5]}, "has image_std: .* three numbers"),
    ({"image_std": [0.5, 0.0, 0.5]}, "divides by zero"),
    ({"rescale_factor": 0}, "divides by zero"),
    ({"resample": ...}, "has resample: None; give a filter: 0 nearest"),
    ({"resample": 5}, "has resample: 5"),
    ({"size": ...}, "gives no size"),
    ({"size": {"longest_edge": 32}, "do_center_crop": False}, "no square"),
    ({"size": {"height": 32, "width": 64}, "do_center_crop": False}, "only squares"),
    ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "rectangles; give crop_size"),
    ({"do_center_crop": True, "crop_size": ...}, "but no crop_size"),
    ({"do_center_crop": True, "crop_size": {"height": 32, "width": 24}}, "only squares"),
    ({"do_center_crop": True, "size": {"shortest_edge": 16}, "crop_size": 32}, "cannot cut 32"),
    (
        {"do_center_crop": True, "size": {"height": 64, "width": 64}, "crop_size": 32},
        "make the two equal",
    ),
    ({"do_resize": False}, "do_resize: False, which does not make squares"),
    ({"do_pad": True}, "do_pad: True, which does not make squares"),
    ({"size": {"height": 4, "width": 4}, "do_center_crop": False}, "pixels"),
]


@pytest.mark.parametrize(("values", "match"), SPOILT)
@pytest.mark.parametrize("name", MODELS)
def test_preprocessor_files_that_say_too_little(
    copy: Callable[[str], Path], name: str, values: dict[str, Any], match: str
) -> None:
    folder = copy(name)
    change(folder / "preprocessor_config.json", **values)
    refused(name, folder, match)


@pytest.mark.parametrize("name", ["aimv2", "clip", "siglip"])
def test_an_encoder_and_a_preprocessor_that_disagree(
    copy: Callable[[str], Path], name: str
) -> None:
    folder = copy(name)
    file = folder / "preprocessor_config.json"
    change(file, size={"height": 64, "width": 64}, do_center_crop=False)
    refused(name, folder, "makes 64 pixels, the encoder takes 32")


@pytest.mark.parametrize("name", MODELS)
def test_configurations_that_are_no_square(copy: Callable[[str], Path], name: str) -> None:
    folder = copy(name)
    change(folder / "config.json", image_size=[32, 64])
    with pytest.raises(ValueError) as error:
        ENCODERS[name].from_folder(folder)
    assert "image_size" in str(error.value)
    folder = copy(name)
    change(folder / "config.json", num_channels=1)
    refused(name, folder, "has 1 channels")


def test_other_ways_of_writing_the_same_preprocessor(
    folders: dict[str, Path], copy: Callable[[str], Path]
) -> None:
    image = decode(IMAGE)
    wanted = encode(ENCODERS["siglip"].from_folder(folders["siglip"]), image)
    folder = copy("siglip")
    file = folder / "preprocessor_config.json"
    for values in (
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"do_rescale": True, "rescale_factor": None, "image_mean": [0.5] * 3}
        | {"image_std": [0.5] * 3, "size": 32},
        {"do_center_crop": True, "crop_size": 32, "size": {"height": 32, "width": 32}},
    ):
        change(file, **values)
        encoder = ENCODERS["siglip"].from_folder(folder)
        torch.testing.assert_close(encode(encoder, image), wanted, rtol=0, atol=1e-5)
    change(file, do_normalize=False)
    assert ENCODERS["siglip"].from_folder(folder).mean == (0.0, 0.0, 0.0)
    whole = {"processor_class": "SiglipProcessor", "image_processor": json.loads(file.read_text())}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    file.unlink()
    assert ENCODERS["siglip"].from_folder(folder).std == (1.0, 1.0, 1.0)
    (folder / "processor_config.json").write_text("{}")
    refused("siglip", folder, "describes no image_processor")
