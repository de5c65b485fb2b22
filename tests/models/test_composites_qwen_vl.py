"""Qwen-VL: read from its classes' folders, trained, written into them again, loaded without us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_packing.pack import collate
from mllm.export import command
from mllm.models.assemble import load
from mllm.models.composites import COMPOSITES
from mllm.models.encoders import ENCODERS
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.composite_checks import (
    check_alone,
    check_packed,
    check_read,
    load_alone,
    same_weights,
    train_a_step,
)
from tests.models.composite_folders import change_json
from tests.models.conftest import change, chat
from tests.models.qwen_folders import save_qwen_vl

NAMES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qwen")
    return {name: save_qwen_vl(root / name, name, tied=name == "qwen2_vl") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_its_own_class_computes(whole: dict[str, Path], name: str) -> None:
    model, processor = load(whole[name], torch.float32)
    assert model.config.origin == COMPOSITES[name].name == name
    assert not model.training
    check_read(name, whole[name], model, processor)
    check_packed(model, processor)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl"])
def test_an_older_configuration_is_read(whole: dict[str, Path], name: str, tmp_path: Path) -> None:
    """The language model's values beside the others, positions under `rope_scaling`."""
    for source in whole[name].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    found = json.loads((tmp_path / "config.json").read_text())
    text, vision = found.pop("text_config"), found["vision_config"]
    rope = text.pop("rope_parameters")
    kept = {key: value for key, value in text.items() if key not in ("model_type", "layer_types")}
    kept |= {"rope_theta": rope["rope_theta"]}
    kept["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    for key in ("model_type", "rope_parameters"):
        del vision[key]
    vision["in_chans"] = vision.pop("in_channels")
    (tmp_path / "config.json").write_text(json.dumps({**kept, **found}))
    model, processor = load(tmp_path, torch.float32)
    check_read(name, tmp_path, model, processor)
    assert same_weights(model, load(whole[name], torch.float32)[0])


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_a_pack_do_not_see_each_other(whole: dict[str, Path], name: str) -> None:
    model, processor = load(whole[name], torch.float32)

    def second(seed: int) -> Any:
        samples = [processor.encode(chat(seed)), processor.encode(chat(7))]
        pack = collate(samples, 0)
        with torch.no_grad():
            logits = model(
                pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
            ).logits[0]
        return logits.split([len(sample.input_ids) for sample in samples])

    one, other = second(1), second(2)
    assert (one[0] - other[0]).abs().max() > 1e-2
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)


def test_written_folders_load_without_us(whole: dict[str, Path], tmp_path: Path) -> None:
    made = {}
    for name in NAMES:
        model, processor = load(whole[name], torch.float32)
        train_a_step(model, processor)
        COMPOSITES[name].write(model, processor, tmp_path / name)
        made[name] = (model, processor)
    found = load_alone({name: (tmp_path / name, name) for name in made}, tmp_path)
    for name, (model, processor) in made.items():
        check_alone(found, name, model, processor)
        assert same_weights(model, load(tmp_path / name, torch.float32)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_changes_nothing(whole: dict[str, Path], name: str, tmp_path: Path) -> None:
    model, processor = load(whole[name], torch.float32)
    COMPOSITES[name].write(model, processor, tmp_path / "theirs")
    again, processor_again = load(tmp_path / "theirs", torch.float32)
    assert same_weights(model, again)
    assert processor.fingerprint == processor_again.fingerprint
    assert model.config.to_dict() == again.config.to_dict()
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    again, processor_again = load(tmp_path / "ours")
    assert same_weights(model, again)
    assert again.config.origin == name
    assert processor.fingerprint == processor_again.fingerprint


@pytest.mark.parametrize("merge", [1, 4])
def test_other_blocks_and_filters_are_kept(merge: int, tmp_path: Path) -> None:
    folder = save_qwen_vl(tmp_path / "theirs", "qwen2_vl", merge=merge, resample=merge // 2)
    model, processor = load(folder, torch.float32)
    assert model.encoder.geometry.merge == merge  # type: ignore[attr-defined]
    check_read("qwen2_vl", folder, model, processor)
    COMPOSITES["qwen2_vl"].write(model, processor, tmp_path / "out")
    check_read("qwen2_vl", tmp_path / "out", model, processor)
    found = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (found["merge_size"], found["resample"]) == (merge, merge // 2)
    again, same = load(tmp_path / "out", torch.float32)
    assert again.config.to_dict() == model.config.to_dict()
    assert same.fingerprint == processor.fingerprint


def test_an_export_goes_back_to_where_the_model_came_from(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    for part in load(whole["qwen3_vl"]):
        part.save_pretrained(tmp_path / "stage")
    command.write(tmp_path / "stage", command.origin(tmp_path / "stage"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3_vl"
    assert same_weights(load(tmp_path / "out")[0], load(whole["qwen3_vl"])[0])


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("config.json", {"image_token_id": 9999}, "images are the token 9999, but the tokenizer"),
        ("config.json", {"vision_end_token_id": 9999}, "vision_end_token_id 9999, but the tokeni"),
        ("preprocessor_config.json", {"patch_size": 8}, "patch_size 8, the encoder takes 4"),
    ],
)
def test_refuses_a_folder(
    whole: dict[str, Path], tmp_path: Path, file: str, changes: dict[str, Any], match: str
) -> None:
    for source in whole["qwen2_vl"].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    change_json(tmp_path / file, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        load(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


def test_refuses_parts_that_it_has_no_place_for(
    whole: dict[str, Path], build: Callable[..., Any], tmp_path: Path
) -> None:
    parts = load(whole["qwen2_5_vl"], torch.float32)
    refused("qwen2_vl", *parts, tmp_path / "out", "cannot hold the encoder qwen2_5_vl")
    model, processor = build("clip", "patch_merger")
    refused("qwen2_vl", model, processor, tmp_path / "out", "cannot hold the encoder clip")
    parts = build("qwen2_vl", "patch_merger", encoder_options={"layer": -2}, factor=2)
    refused("qwen2_vl", *parts, tmp_path / "out", "the encoder's layer -2: it takes the last")
    for options, match in (
        ({"name": "mlp"}, "the connector mlp"),
        ({"norm": "layer"}, "the connector's norm layer: it is rms there"),
    ):
        model, processor = load(whole["qwen2_5_vl"], torch.float32)
        model.config.connector = {**model.config.connector, **options}
        refused("qwen2_5_vl", model, processor, tmp_path / "out", match)


def refused(
    name: str, model: MultimodalModel, processor: Processor, folder: Path, match: str
) -> None:
    """In one line, and before anything is written."""
    with pytest.raises(ValueError, match=match) as caught:
        COMPOSITES[name].write(model, processor, folder)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "config.json has no text_config, which says"),
        ({"vision_config": None}, "config.json has no vision_config, which says"),
        ({"image_token_id": -5}, "images are the token -5, but the tokenizer has"),
        ({"vision_start_token_id": -3}, "vision_start_token_id -3, but the tokenizer has"),
    ],
)
def test_a_configuration_that_makes_no_sense(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = save_qwen_vl(tmp_path / "given", "qwen2_5_vl")
    change(folder / "config.json", **changes)
    for weights in (False, True):
        with pytest.raises(ValueError, match=message) as caught:
            load(folder, weights=weights)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_directions_that_are_not_a_head_s(tmp_path: Path, name: str) -> None:
    folder = save_qwen_vl(tmp_path / "given", name)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text["rope_parameters"]["mrope_section"] = [2, 2, 2]
    change(folder / "config.json", text_config=text)
    with pytest.raises(ValueError, match=r"mrope_section \[2, 2, 2\], .* come to 8, half"):
        load(folder, weights=False)


def test_a_bound_of_images_that_is_no_number(tmp_path: Path) -> None:
    folder = save_qwen_vl(tmp_path / "given", "qwen2_vl", min_pixels="many")
    with pytest.raises(ValueError, match="the preprocessor file makes no sense: .*'many'; copy"):
        load(folder)


def test_weights_of_another_width(tmp_path: Path) -> None:
    folder = save_qwen_vl(tmp_path / "given", "qwen2_vl")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder / "config.json", text_config={**text, "intermediate_size": 10**12})
    with pytest.raises(ValueError, match=r"of 288,000,000,044,592 weights, the files hold 58,416"):
        load(folder)  # no machine has room for it
    change(folder / "config.json", text_config={**text, "intermediate_size": 56})
    with pytest.raises(ValueError, match=r"9 weights of .*\(\[32, 48\] in the file, \[32, 56\] by"):
        load(folder)


def test_an_encoder_of_a_model_that_says_nothing_of_it(tmp_path: Path) -> None:
    folder = save_qwen_vl(tmp_path / "given", "qwen2_vl")
    change(folder / "config.json", vision_config=None)
    with pytest.raises(ValueError, match="config.json has no vision_config, which says"):
        ENCODERS["qwen2_vl"].from_folder(folder)
