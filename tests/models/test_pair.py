"""Two encoders side by side: each sees what it should, and features meet on one grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from torch import Tensor
from transformers import Dinov2Model

from data_packing.images import decode
from data_packing.pack import collate
from mllm.models.assemble import assemble, load
from mllm.models.encoders import ENCODERS
from mllm.models.encoders.pair import PairEncoder
from mllm.models.modeling import MultimodalModel
from tests.models.conftest import documents, picture
from tests.models.test_encoder_families import encode, odd_images
from tests.models.test_packed_equals_unpacked import (
    assert_packed_is_unpacked,
    gradients,
    logits_of,
)

IMAGE = picture(1).data


def made(
    folders: dict[str, Path], first: str, second: str, resize: str | None = None, **options: Any
) -> PairEncoder:
    """A pair; first_layer=-1 is an option of the first."""
    sections: dict[str, Any] = {
        "first": {"name": first, "path": str(folders[first])},
        "second": {"name": second, "path": str(folders[second])},
    }
    for key, value in options.items():
        part, option = key.split("_", 1)
        sections[part][option] = value
    rule = {} if resize is None else {"resize": resize}
    return PairEncoder.from_folder(**sections, **rule).eval()


def own_normalisation(pair: PairEncoder, name: str, seen: np.ndarray[Any, Any]) -> Tensor:
    """[1, 3, s, s] of uint8 [s, s, 3], as the part wants it."""
    part = getattr(pair, name)
    pixels = (torch.from_numpy(seen) / 255 - torch.tensor(part.mean)) / torch.tensor(part.std)
    return pixels.permute(2, 0, 1)[None]


def test_both_see_the_same_square_normalised_as_each_wants(folders: dict[str, Path]) -> None:
    pair = made(folders, "siglip", "dinov2", second_layer=-1, second_class_token=True)
    image = decode(IMAGE)
    found = encode(pair, image)
    assert pair.geometry.resize == "squash"
    assert found.shape == (16, pair.width) == (16, 16 + 32)
    alone = ENCODERS["siglip"].from_folder(folders["siglip"]).eval()
    assert torch.equal(found[:, :16], encode(alone, image))
    whole = Dinov2Model.from_pretrained(folders["dinov2"]).eval()
    states = whole(own_normalisation(pair, "second", alone.preprocess(image))).last_hidden_state[0]
    torch.testing.assert_close(found[:, 16:32], states[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 32:], states[:1].expand(16, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [("dinov3_convnext", "siglip"), ("siglip", "dinov3_convnext")])
def test_the_smaller_one_sees_the_larger_square_scaled_down(
    folders: dict[str, Path], order: tuple[str, str]
) -> None:
    pair = made(folders, *order)
    assert pair.image_size == 64
    image = decode(picture(2, 90, 130).data)
    square = pair.preprocess(image)
    small, large = ("first", "second") if order[0] == "siglip" else ("second", "first")
    images = own_normalisation(pair, "first", square)
    seen = pair._view(images, getattr(pair, small))
    filtered = PillowImage.fromarray(square).resize((32, 32), PillowImage.Resampling.BICUBIC)
    wanted = own_normalisation(pair, small, np.array(filtered))
    step = 1 / 255 / min(getattr(pair, small).std)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=step)
    assert seen.shape == (1, 3, 32, 32)
    harsh = np.random.default_rng(0).integers(0, 2, square.shape, dtype=np.uint8) * 255
    seen = pair._view(own_normalisation(pair, "first", harsh), getattr(pair, small))
    assert seen.abs().max() <= 1 + 1e-6  # the filter overshoots, pixels do not
    same = own_normalisation(pair, large, square)
    torch.testing.assert_close(pair._view(images, getattr(pair, large)), same, rtol=0, atol=1e-5)
    found = pair.features(images)[0]
    parts = [getattr(pair, part) for part in ("first", "second")]
    views = [pair._view(images, part) for part in parts]
    both = torch.cat([part.features(view)[0] for part, view in zip(parts, views, strict=True)], -1)
    assert torch.equal(found, both)


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ({"first": "siglip", "second": "dinov3_convnext", "second_layer": -2}, (4, 8)),
        ({"first": "dinov3_convnext", "second": "siglip", "first_layer": -2}, (8, 4)),
        ({"first": "dinov3_convnext", "second": "efficientnet_lite"}, (4, 7)),
    ],
)
def test_features_of_the_second_come_to_the_grid_of_the_first(
    folders: dict[str, Path], options: dict[str, Any], cells: tuple[int, int]
) -> None:
    pair = made(folders, **options)
    assert (pair.first.geometry.cells, pair.second.geometry.cells) == cells
    assert pair.grid(5, 9) == cells[:1] * 2
    images = own_normalisation(pair, "first", pair.preprocess(decode(IMAGE)))
    found = pair.features(images)[0]
    assert found.shape == (cells[0] ** 2, pair.width)
    maps = pair.second.features(pair._view(images, pair.second))[0].detach()
    for channel in (0, 3):
        plane = maps[:, channel].unflatten(0, (cells[1], cells[1])).numpy()
        scaled = PillowImage.fromarray(plane).resize(cells[:1] * 2, PillowImage.Resampling.BILINEAR)
        wanted = torch.from_numpy(np.array(scaled)).flatten()
        column = found[:, pair.first.width + channel]
        torch.testing.assert_close(column, wanted, rtol=1e-4, atol=1e-4)


def test_the_rule_is_the_firsts_or_the_pairs(folders: dict[str, Path]) -> None:
    for first, resize, rule, edge in (
        ("dinov2", None, "crop", 72),  # 36 for 32, at twice the side
        ("clip", None, "crop", 64),
        ("siglip", None, "squash", 0),
        ("dinov2", "pad", "pad", 0),
    ):
        pair = made(folders, first, "dinov3_convnext", resize)
        assert (pair.geometry.resize, pair.geometry.short_edge) == (rule, edge)
        assert pair.mean == pair.first.mean


def assembled(folders: dict[str, Path], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    section = {
        "encoder": {
            "name": "pair",
            "first": {"name": "siglip", "path": folders["siglip"]},
            "second": {"name": "dinov3_convnext", "path": folders["dinov3_convnext"], "layer": -2},
        },
        "connector": {"name": "average_pool", "visual_tokens": 4},
        "language_model": {"path": folders["llama"]},
    }
    return assemble(section, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assembled_saved_and_loaded(
    folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    model, processor = assembled(folders, dtype)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert str(folders["siglip"]) not in (tmp_path / "config.json").read_text()
    again, other = load(tmp_path)
    pack = collate([processor.encode(one) for one in documents()], 0)
    assert torch.equal(pack.pixels, collate([other.encode(one) for one in documents()], 0).pixels)
    with torch.no_grad():
        assert torch.equal(logits_of(again, pack), logits_of(model, pack))


def test_packed_equals_unpacked(folders: dict[str, Path]) -> None:
    model, processor = assembled(folders)
    model.train()
    assert_packed_is_unpacked(model, processor)


def test_one_may_train_while_the_other_is_frozen(folders: dict[str, Path]) -> None:
    model, processor = assembled(folders)
    assert isinstance(model, MultimodalModel)
    model.encoder.first.requires_grad_(False)
    model.train()
    pack = collate([processor.encode(one) for one in documents()], 0)
    logits_of(model, pack).square().sum().backward()
    found = {name for name in gradients(model) if name.startswith("encoder.")}
    learning = {f"encoder.second.{name}" for name, _ in model.encoder.second.named_parameters()}
    assert found == learning
    assert model.encoder.second.training
    assert not model.encoder.first.training


def test_a_spec_rebuilds_the_module(folders: dict[str, Path]) -> None:
    pair = made(folders, "clip", "dinov3_vit", first_layer=-3)
    again = PairEncoder(json.loads(json.dumps(pair.spec))).eval()
    again.load_state_dict(pair.state_dict())
    assert torch.equal(encode(pair, decode(IMAGE)), encode(again, decode(IMAGE)))


def test_every_kind_of_image(folders: dict[str, Path]) -> None:
    for rule in (None, "squash", "crop", "pad"):
        pair = made(folders, "dinov2", "dinov3_convnext", rule)
        for what, data in odd_images().items():
            features = encode(pair, decode(data))
            assert features.shape == (16, pair.width), what
            assert features.isfinite().all(), what


def test_pairs_that_cannot_be(folders: dict[str, Path], tmp_path: Path) -> None:
    good = {"name": "clip", "path": folders["clip"]}
    for options, match in (
        ({"first": good}, r"second is missing; give \{name: …, path: …\}"),
        ({"first": "clip", "second": good}, "first must be .*, got 'clip'"),
        ({"first": {"name": "clip"}, "second": good}, "needs first"),
        ({"first": good, "second": {**good, "name": "clipp"}}, "encoder of second 'clipp'; did"),
        ({"first": good, "second": {**good, "name": "pair"}}, "second: a pair of pairs"),
        ({"first": good, "second": {**good, "resize": "pad"}}, "second: both see one view"),
        ({"first": good, "second": {**good, "layr": -1}}, r"\(second\) 'layr'; did you mean"),
        ({"first": good, "second": {**good, "layer": -9}}, "layer -9"),
        ({"first": good, "second": {**good, "path": tmp_path}}, "no config.json"),
        ({"first": {"name": "siglip", "path": folders["clip"]}, "second": good}, "holds a 'clip"),
        ({"first": good, "second": good, "third": good}, "unknown option of the encoder Pair"),
        ({"first": good, "second": good, "path": tmp_path}, "a pair has no path of its own"),
        (
            {"first": good, "second": good, "resize": "stretch"},
            "resize must be .*, got 'stretch'",
        ),
    ):
        with pytest.raises(ValueError, match=match) as refused:
            PairEncoder.from_folder(**options)
        assert "\n" not in str(refused.value)
