"""Encoders of transformers: the same features as its own models and image processors give."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionModel,
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ConvNextModel,
    DINOv3ViTModel,
    InternVLVisionModel,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from data_packing.images import decode
from data_packing.pack import collate, join_views
from mllm.models.assemble import assemble, load
from mllm.models.encoders import ENCODERS, VisionEncoder
from tests.models.conftest import documents, picture
from tests.models.encoder_folders import save_aimv2
from tests.models.own_processors import usable

MODELS: dict[str, type[PreTrainedModel]] = {
    "aimv2": Aimv2VisionModel,
    "clip": CLIPVisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_convnext": DINOv3ConvNextModel,
    "dinov3_vit": DINOv3ViTModel,
    "idefics3": Idefics3VisionTransformer,
    "internvl": InternVLVisionModel,
    "siglip": SiglipVisionModel,
}
IMAGE = picture(1).data


def encode(encoder: VisionEncoder, image: NDArray[np.uint8]) -> Tensor:
    """Features [cells, Dv] of one decoded image."""
    return encoder(*join_views([encoder.preprocess(image)]))


def own_pixels(name: str, folder: Path, image: NDArray[np.uint8]) -> Tensor:
    """[1, 3, S, S], by the folder's own image processor."""
    if not name.startswith("dinov3"):  # its only class needs torchvision
        if not usable(AutoImageProcessor):
            pytest.skip("AutoImageProcessor needs torchvision in this transformers, not from 5.18")
        own = AutoImageProcessor.from_pretrained(folder)
        return own(PillowImage.fromarray(image), return_tensors="pt")["pixel_values"]
    seen = json.loads((folder / "preprocessor_config.json").read_text())
    scaled = torch.from_numpy(image).permute(2, 0, 1)[None] * seen["rescale_factor"]
    side = (seen["size"]["height"], seen["size"]["width"])
    squashed = torch.nn.functional.interpolate(scaled, side, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(seen[key])[:, None, None] for key in ("image_mean", "image_std"))
    return (squashed - mean) / std


def change(file: Path, **values: Any) -> None:
    """Set values of a JSON file; `...` removes one."""
    kept = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))


def refused(name: str, folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as error:
        ENCODERS[name].from_folder(folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(
    folders: dict[str, Path], name: str, layer: int
) -> None:
    image = decode(IMAGE)
    whole = MODELS[name].from_pretrained(folders[name]).eval()
    pixels = own_pixels(name, folders[name], image)
    states = whole(pixels, output_hidden_states=True)
    encoder = ENCODERS[name].from_folder(folders[name], layer=layer).eval()
    found = encode(encoder, image)
    wanted = states.hidden_states[layer]
    if layer == -1 and name != "clip":
        wanted = states.last_hidden_state
    if wanted.ndim == 4:
        wanted = wanted.flatten(2).transpose(1, 2)
    wanted = wanted[0, -len(found) :]
    assert wanted.std() > 0.1
    if name.startswith("dinov3"):  # it resizes floats, we resize bytes
        mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
        seen = torch.from_numpy(encoder.preprocess(image)).float()
        own = (pixels[0].permute(1, 2, 0) * std + mean) * 255
        assert (own - seen).abs().max() < 1.01
        found = encoder.features(pixels)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_the_class_token_stands_beside_every_cell(folders: dict[str, Path], name: str) -> None:
    image = decode(IMAGE)
    plain = ENCODERS[name].from_folder(folders[name], layer=-1).eval()
    encoder = ENCODERS[name].from_folder(folders[name], layer=-1, class_token=True).eval()
    assert encoder.width == 2 * plain.width
    found = encode(encoder, image)
    whole = MODELS[name].from_pretrained(folders[name]).eval()
    side = encoder.image_size
    one = torch.from_numpy(encoder.preprocess(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.mean, encoder.std))
    states = whole(((one - mean) / std).reshape(1, 3, side, side))
    assert torch.equal(found[:, : plain.width], encode(plain, image))
    for row in found[:, plain.width :]:
        torch.testing.assert_close(row, states.pooler_output[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="class_token must be true or false, got 'yes'"):
        ENCODERS[name].from_folder(folders[name], class_token="yes")


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_used_is_not_built(folders: dict[str, Path], name: str, layer: int) -> None:
    encoder = ENCODERS[name].from_folder(folders[name], layer=layer)
    encoder.train()
    encode(encoder, decode(IMAGE)).square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    whole = ENCODERS[name].from_folder(folders[name], layer=-1)
    count = [sum(p.numel() for p in one.parameters()) for one in (encoder, whole)]
    assert (count[0] < count[1]) == (layer != -1)


@pytest.mark.parametrize("name", MODELS)
def test_training_adds_no_noise(folders: dict[str, Path], name: str) -> None:
    encoder = ENCODERS[name].from_folder(folders[name], layer=-1)
    image = decode(IMAGE)
    assert torch.equal(encode(encoder.train(), image), encode(encoder.eval(), image))
    assert encoder.train().training


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_rebuilds_the_module(folders: dict[str, Path], name: str) -> None:
    options = {"class_token": True} if "class_token" in ENCODERS[name].OPTIONS else {}
    encoder = ENCODERS[name].from_folder(folders[name], **options)
    again = ENCODERS[name](json.loads(json.dumps(encoder.spec)))
    again.load_state_dict(encoder.state_dict())
    image = decode(IMAGE)
    assert torch.equal(encode(encoder.eval(), image), encode(again.eval(), image))
    assert again.width == encoder.width
    assert again.geometry == encoder.geometry
    assert ENCODERS[name].from_folder(folders[name], **options).spec == encoder.spec


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_every_feature(
    folders: dict[str, Path], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    section = {
        "encoder": {"name": name, "path": folders[name]},
        "connector": {"name": "mlp"},
        "language_model": {"path": folders["llama"]},
    }
    model, processor = assemble(section, dtype=dtype)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, other = load(tmp_path)
    pack = collate([processor.encode(one) for one in documents()], 0)
    same = collate([other.encode(one) for one in documents()], 0)
    assert torch.equal(pack.pixels, same.pixels)
    image = decode(IMAGE)
    assert torch.equal(encode(model.encoder, image), encode(again.encoder, image))
    assert {p.dtype for p in again.encoder.parameters()} == {dtype}
    with torch.no_grad():
        wanted = model.hidden_states(
            pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
        )
        found = again.hidden_states(
            same.input_ids, same.pixels, same.sizes, cu_seqlens=same.cu_seqlens
        )
    assert torch.equal(found, wanted)


def test_rotary_frequencies_stay_in_fp32(folders: dict[str, Path]) -> None:
    encoder = ENCODERS["dinov3_vit"].from_folder(folders["dinov3_vit"]).eval()
    exact: Any = encoder.vision.rope_embeddings.inv_freq.clone()
    encoder.to(torch.bfloat16)
    assert torch.equal(encoder.vision.rope_embeddings.inv_freq, exact)
    own = DINOv3ViTModel.from_pretrained(folders["dinov3_vit"], dtype=torch.bfloat16).eval()
    pixels = own_pixels("dinov3_vit", folders["dinov3_vit"], decode(IMAGE)).to(torch.bfloat16)
    wanted = own(pixels, output_hidden_states=True).hidden_states[-2][:, 3:]
    assert torch.equal(encoder.features(pixels), wanted)


# -- images ------------------------------------------------------------------------------------


def file(image: PillowImage.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_images() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    photo = PillowImage.fromarray(noise)
    deep = PillowImage.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    return {
        "one pixel": file(PillowImage.new("RGB", (1, 1), (200, 10, 10))),
        "1x500": file(photo.resize((500, 1))),
        "5000x3": file(photo.resize((3, 5000))),
        "60000x1": file(photo.resize((1, 60000))),
        "grey": file(photo.convert("L")),
        "palette": file(photo.convert("P")),
        "alpha": file(photo.convert("RGBA")),
        "CMYK": file(photo.convert("CMYK"), "JPEG"),
        "16 bit": file(deep),
        "animated": file(
            photo.convert("P"),
            "GIF",
            save_all=True,
            append_images=[photo.rotate(180).convert("P")],
        ),
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_image(folders: dict[str, Path], name: str) -> None:
    for rule in (None, "squash", "crop", "pad"):
        options = {} if rule is None else {"resize": rule}
        encoder = ENCODERS[name].from_folder(folders[name], **options).eval()
        for what, data in odd_images().items():
            features = encode(encoder, decode(data))
            assert features.shape == (encoder.geometry.cells**2, encoder.width), (what, rule)
            assert features.isfinite().all(), (what, rule)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_a_strip_is_cut_as_its_own_processor_cuts_it(folders: dict[str, Path], name: str) -> None:
    encoder = ENCODERS[name].from_folder(folders[name])
    mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
    for size in ((900, 20), (7, 400), (1, 500)):
        image = decode(picture(3, *size).data)
        own = own_pixels(name, folders[name], image)[0].permute(1, 2, 0) * std + mean
        found = torch.from_numpy(encoder.preprocess(image)).float()
        assert (found - own * 255).abs().max() < 2, size
        assert own.std() > 0.01


def test_a_strip_is_never_scaled_whole(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    resize = PillowImage.Image.resize

    def noting(image: Any, size: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        sizes.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(PillowImage.Image, "resize", noting)
    encoder = ENCODERS["dinov2"].from_folder(folders["dinov2"])
    for shape in ((1, 60000, 3), (60000, 2, 3), (40, 600, 3)):
        encoder.preprocess(np.zeros(shape, dtype=np.uint8))
    assert sizes == [(32, 32), (32, 32), (540, 36)]


# -- checkpoints as they are published ---------------------------------------------------------


def test_siglip2_of_one_resolution_is_siglip(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its config.json says `model_type: siglip`; the folder holds both towers."""
    vision = SiglipVisionModel.from_pretrained(folders["siglip"])
    config = SiglipConfig(
        vision_config=vision.config.to_dict(),
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"intermediate_size": 16, "vocab_size": 20, "projection_size": 16},
    )
    whole = SiglipModel(config)
    whole.save_pretrained(tmp_path)
    shutil.copy(folders["siglip"] / "preprocessor_config.json", tmp_path)
    found = encode(ENCODERS["siglip"].from_folder(tmp_path), decode(IMAGE))
    pixels = own_pixels("siglip", folders["siglip"], decode(IMAGE))
    states = whole.vision_model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, states[-2][0], rtol=0, atol=1e-5)


def test_siglip2_of_variable_resolution_is_refused(tmp_path: Path) -> None:
    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    Siglip2VisionModel(config).save_pretrained(tmp_path)
    refused("siglip", tmp_path, "SigLIP 2 of variable resolution")


@pytest.mark.parametrize("name", ["clip", "aimv2"])
def test_vision_towers_of_whole_models(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "vocab_size": 20}
    vision = MODELS[name].from_pretrained(folders[name]).config.to_dict()
    kinds: dict[str, tuple[Any, Any]] = {
        "clip": (CLIPConfig, CLIPModel),
        "aimv2": (Aimv2Config, Aimv2Model),
    }
    config, model = kinds[name]
    whole = model(config(vision_config=vision, text_config=text, projection_dim=16)).eval()
    whole.save_pretrained(tmp_path)
    shutil.copy(folders[name] / "preprocessor_config.json", tmp_path)
    encoder = ENCODERS[name].from_folder(tmp_path).eval()
    pixels = own_pixels(name, folders[name], decode(IMAGE))
    states = whole.vision_model(pixels, output_hidden_states=True)
    wanted = states.last_hidden_state if name == "aimv2" else states.hidden_states[-2][:, 1:]
    torch.testing.assert_close(encode(encoder, decode(IMAGE)), wanted[0], rtol=0, atol=1e-5)


def test_aimv2_of_native_resolution_takes_the_preprocessors_side(tmp_path: Path) -> None:
    folder = save_aimv2(tmp_path, is_native=True)
    side = {"height": 48, "width": 48}
    change(folder / "preprocessor_config.json", size={"shortest_edge": 48}, crop_size=side)
    encoder = ENCODERS["aimv2"].from_folder(folder).eval()
    assert encoder.grid(10, 10) == (6, 6)
    whole = Aimv2VisionModel.from_pretrained(folder).eval()
    wanted = whole(own_pixels("aimv2", folder, decode(IMAGE))).last_hidden_state[0]
    torch.testing.assert_close(encode(encoder, decode(IMAGE)), wanted, rtol=0, atol=1e-5)
