"""Encoders of native resolution: the same features as transformers' own towers and processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from data_packing.pack import collate, join_views
from mllm.models.assemble import assemble, load
from mllm.models.encoders import ENCODERS, VisionEncoder
from mllm.models.geometry import geometry_from_dict
from mllm.models.modeling import MultimodalModel
from mllm.models.native import NativeGeometry
from mllm.training.pack_cost import patch_cost
from tests.models.conftest import documents
from tests.models.encoder_folders import save
from tests.models.native_folders import NATIVE, VISION, qwen_processor
from tests.models.own_processors import usable

SIZES = [(40, 56), (8, 90), (61, 17), (300, 200), (3, 3)]
WHOLE: dict[str, Any] = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("native")
    return {name: saver(root / name) for name, saver in NATIVE.items()}


def images(sizes: list[tuple[int, int]] = SIZES) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    made = []
    for height, width in sizes:
        small = PillowImage.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        made.append(np.array(small.resize((width, height), PillowImage.Resampling.BICUBIC)))
    return made


def encode(encoder: VisionEncoder, chosen: list[NDArray[np.uint8]]) -> Tensor:
    views = [view for image in chosen for view in encoder.geometry.views(image)]
    features: Tensor = encoder(*join_views(views))
    return features


def by_transformers(name: str, folder: Path, image: NDArray[np.uint8], layer: int) -> Tensor:
    """Features [C, Dv] of one image, row by row, by its own processor and model."""
    if not usable(AutoImageProcessor):
        pytest.skip("AutoImageProcessor needs torchvision in this transformers, not from 5.18")
    seen = AutoImageProcessor.from_pretrained(folder)
    inputs = seen(PillowImage.fromarray(image), return_tensors="pt")
    kind: Any = ENCODERS[name]
    model = kind.MODEL.from_pretrained(folder).eval()
    if name == "siglip2_naflex":
        states = model(**inputs, output_hidden_states=True)
        wanted = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
        return wanted[0, : int(inputs["pixel_attention_mask"].sum())]
    kept: list[Tensor] = []
    model.blocks[layer].register_forward_hook(lambda *args: kept.append(args[2]))
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    index = torch.arange(rows * columns // 4)
    if name == "qwen2_5_vl":
        from transformers.vision_utils import get_vision_window_index

        index, _ = get_vision_window_index(inputs["image_grid_thw"], 2, 16, 4)
    model(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    placed = torch.empty(rows, columns, kept[0].shape[-1])
    for number, block in zip(index.tolist(), kept[0].split(4), strict=True):
        row, column = divmod(number, columns // 2)
        placed[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = block.view(2, 2, -1)
    return placed.flatten(0, 1)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_features_are_those_of_transformers(native: dict[str, Path], name: str, layer: int) -> None:
    encoder = ENCODERS[name].from_folder(native[name], layer=layer).eval()
    found = encode(encoder, images())
    wanted = [by_transformers(name, native[name], image, layer) for image in images()]
    assert len({len(one) for one in wanted}) > 1
    assert found.std() > 0.1
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)


@torch.no_grad()
def test_inner_layers_stand_beside_the_last(native: dict[str, Path]) -> None:
    plain = ENCODERS["qwen3_vl"].from_folder(native["qwen3_vl"]).eval()
    encoder = ENCODERS["qwen3_vl"].from_folder(native["qwen3_vl"], deepstack=True).eval()
    assert encoder.width == 3 * plain.width
    levels = encode(encoder, images()).chunk(3, dim=-1)
    torch.testing.assert_close(levels[0], encode(plain, images()), rtol=0, atol=0)
    for level, layer in zip(levels[1:], (0, 1), strict=True):
        inner = ENCODERS["qwen3_vl"].from_folder(native["qwen3_vl"], layer=layer - 3).eval()
        torch.testing.assert_close(level, encode(inner, images()), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="deepstack must be true or false, got 1"):
        ENCODERS["qwen3_vl"].from_folder(native["qwen3_vl"], deepstack=1)


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["few", "many"]))
@settings(max_examples=150, deadline=None)
def test_sizes_are_those_of_transformers(height: int, width: int, bounds: str) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    from transformers.models.siglip2.image_processing_pil_siglip2 import (
        get_image_size_for_max_num_patches,
    )

    half = (0.5, 0.5, 0.5)
    least, most, patches = (3136, 200704, 256) if bounds == "few" else (65536, 12845056, 1024)
    naflex = NativeGeometry(16, 1, half, half, max_patches=patches)
    qwen = NativeGeometry(14, 2, half, half, min_pixels=least, max_pixels=most)
    if max(height, width) <= 200 * min(height, width):
        wanted = get_image_size_for_max_num_patches(height, width, 16, patches)
        assert naflex.view_sizes(height, width) == (wanted,)
        assert qwen.view_sizes(height, width) == (smart_resize(height, width, 28, least, most),)
    for geometry in (naflex, qwen):
        rows, columns = geometry.grid(*geometry.view_sizes(height, width)[0])
        assert min(rows, columns) >= geometry.merge
        assert rows * columns <= (most / 14**2 if geometry is qwen else patches) + 400


@pytest.mark.parametrize("name", NATIVE)
def test_views_do_not_see_each_other(native: dict[str, Path], name: str) -> None:
    encoder = ENCODERS[name].from_folder(native[name]).eval()
    chosen = images()
    together = encode(encoder, chosen)
    alone = torch.cat([encode(encoder, [one]) for one in chosen])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    before = len(encode(encoder, chosen[:1]))
    changed = encode(encoder, [255 - chosen[0], *chosen[1:]])
    assert (changed[:before] - together[:before]).abs().max() > 0.1
    assert torch.equal(changed[before:], together[before:])


@pytest.mark.parametrize("name", WHOLE)
def test_a_folder_of_the_whole_model_will_do(
    native: dict[str, Path], name: str, tmp_path: Path
) -> None:
    config, kind = WHOLE[name]
    text = {key: value for key, value in TEXT.items() if key != "head_dim" or name == "qwen3_vl"}
    whole = kind(config(text_config=text, vision_config=VISION[name]))
    save(tmp_path, whole, qwen_processor())
    encoder = ENCODERS[name].from_folder(tmp_path)
    found = dict(encoder.vision.named_parameters())
    wanted = dict(whole.model.visual.named_parameters())
    assert {key for key in wanted if "merger" not in key} == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in found)


def test_bounds_come_from_the_file_or_the_recipe(native: dict[str, Path], tmp_path: Path) -> None:
    geometry = ENCODERS["qwen2_vl"].from_folder(native["qwen2_vl"], max_pixels=512).geometry
    assert isinstance(geometry, NativeGeometry)
    assert (geometry.min_pixels, geometry.max_pixels) == (256, 512)
    assert geometry.resampling == "bicubic"
    assert geometry_from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    naflex = ENCODERS["siglip2_naflex"].from_folder(native["siglip2_naflex"], max_patches=9)
    assert naflex.geometry.view_sizes(50, 50) == ((12, 12),)
    cases = {
        "min_pixels 256 is more than max_pixels 100": ("qwen2_vl", {"max_pixels": 100}),
        "is less than one block of 8 x 8": ("qwen2_vl", {"min_pixels": 1, "max_pixels": 40}),
        "max_pixels must be a whole number": ("qwen2_vl", {"max_pixels": 1e6}),
        "unknown option": ("qwen2_vl", {"max_patches": 4}),
    }
    for message, (name, options) in cases.items():
        with pytest.raises(ValueError, match=message):
            ENCODERS[name].from_folder(native[name], **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 8}, "patch_size 8, the encoder takes 4"),
        ({"merge_size": 1}, "merge_size 1, the encoder takes 2"),
        ({"image_processor_type": "CLIPImageProcessor"}, "is one of CLIPImageProcessor"),
        ({"do_resize": False}, "do_resize: false"),
        ({"size": {"height": 4, "width": 4}, "min_pixels": None, "max_pixels": None}, "shortest"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    native: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((native["qwen2_vl"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(qwen_processor(**changes)))
    with pytest.raises(ValueError, match=message) as error:
        ENCODERS["qwen2_vl"].spec_from_folder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NATIVE)
def test_views_and_pixels_that_do_not_fit_are_refused(native: dict[str, Path], name: str) -> None:
    encoder = ENCODERS[name].from_folder(native[name])
    with pytest.raises(ValueError, match="sides are whole blocks of [48] pixels, not 18 x 16"):
        encoder(torch.zeros(18 * 16 * 3, dtype=torch.uint8), torch.tensor([[18, 16]]))
    with pytest.raises(ValueError, match="1 views have 768 bytes of pixels, got "):
        encoder(torch.zeros(5, dtype=torch.uint8), torch.tensor([[16, 16]]))


@pytest.mark.parametrize("name", NATIVE)
def test_any_image_fits(native: dict[str, Path], name: str) -> None:
    geometry = ENCODERS[name].from_folder(native[name]).geometry
    for height, width in [(1, 1), (1, 5000), (5000, 1), (2000, 3000)]:
        (view,) = geometry.views(np.zeros((height, width, 3), dtype=np.uint8))
        assert (view.shape[:2],) == geometry.view_sizes(height, width)
        assert view.nbytes < 3 * 16 * 4 * 1000


@pytest.mark.parametrize("name", NATIVE)
def test_the_cost_of_a_patch_is_counted_without_data(native: dict[str, Path], name: str) -> None:
    encoder = ENCODERS[name].from_folder(native[name])
    weights = sum(weight.numel() for weight in encoder.vision.parameters() if weight.ndim > 1)
    assert weights < patch_cost(encoder) < 5 * weights


@pytest.mark.parametrize("name", NATIVE)
def test_a_model_saves_and_loads(
    native: dict[str, Path], folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    section = {
        "encoder": {"name": name, "path": native[name]},
        "connector": {"name": "pixel_shuffle"},
        "language_model": {"path": folders["llama"]},
    }
    model, processor = assemble(section)
    pack = collate([processor.encode(one) for one in documents()], 0)
    assert len(set(map(tuple, pack.sizes.tolist()))) > 1

    def call(one: Any) -> Tensor:
        logits: Tensor = one(
            pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
        ).logits
        return logits

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, read = load(tmp_path)
    assert read.geometry == processor.geometry
    assert torch.equal(call(model), call(again))


@pytest.mark.parametrize("name", NATIVE)
def test_a_step_without_images_runs_every_weight(build: Callable[..., Any], name: str) -> None:
    """Ranks with sharded weights wait for each other: a small view takes the images' place."""
    model, _ = build(name, "patch_merger")
    model.train()
    none = torch.zeros(0, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.int32)
    model.hidden_states(torch.tensor([[4, 5, 6]]), *none).sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == []


def test_bounds_change_when_a_saved_model_is_loaded(
    native: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    section: dict[str, Any] = {
        "encoder": {"name": "qwen2_vl", "path": native["qwen2_vl"]},
        "connector": {"name": "patch_merger"},
        "language_model": {"path": folders["llama"]},
    }
    for part in assemble(section):
        part.save_pretrained(tmp_path / "native")
    start: dict[str, Any] = {"from": tmp_path / "native"}
    model, processor = assemble({**start, "encoder": {"max_pixels": 400}})
    assert processor.geometry == model.encoder.geometry
    assert processor.image_cost(100, 100) == (4, 16)
    assert assemble(start)[1].image_cost(100, 100)[1] > 100
    model.save_pretrained(tmp_path / "changed")
    again = MultimodalModel.from_pretrained(tmp_path / "changed")
    assert again.encoder.geometry == model.encoder.geometry
    for bad, match in (
        ({"max_patches": 4}, "no bound of this encoder's images; it has min_pixels and max_pixels"),
        ({"max_pixels": 100}, "min_pixels 256 is more than max_pixels 100"),
        ({"name": "clip"}, "model.from takes the encoder"),
    ):
        with pytest.raises(ValueError, match=match):
            assemble({**start, "encoder": bad})
    section["encoder"] = {"name": "clip", "path": folders["clip"]}
    for part in assemble(section):
        part.save_pretrained(tmp_path / "square")
    with pytest.raises(ValueError, match="takes squares of 32 pixels, which have no bounds"):
        load(tmp_path / "square", encoder={"max_pixels": 400})


def test_a_connector_must_take_what_a_dot_becomes(
    native: dict[str, Path], folders: dict[str, Path]
) -> None:
    section: dict[str, Any] = {
        "encoder": {"name": "qwen2_vl", "path": native["qwen2_vl"]},
        "connector": {"name": "average_pool", "visual_tokens": 16},
        "language_model": {"path": folders["llama"]},
    }
    _, processor = assemble(section)
    assert processor.image_cost(2, 500)[0] == 16
    section["connector"]["visual_tokens"] = 25
    with pytest.raises(ValueError, match="5 x 5 grid, but the encoder gives 4 x 4 cells"):
        assemble(section)
