"""Idefics3 and SmolVLM: read from their classes' folders, trained, written back, loaded without
us."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Idefics3ImageProcessorPil

from mllm.models.assemble import assemble
from mllm.models.composites import COMPOSITES
from mllm.models.encoders.idefics3 import shares_positions
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
from tests.models.composite_folders import change_json, save_idefics3
from tests.models.conftest import save_language_model, save_siglip
from tests.models.own_processors import usable

NAMES = ("idefics3", "smolvlm")
needs_images = pytest.mark.skipif(
    not usable(Idefics3ImageProcessorPil),
    reason="its image processors need torchvision in this transformers, not from 5.18",
)
Parts = tuple[MultimodalModel, Processor]


@pytest.fixture(scope="module")
def composites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("composites")
    return {name: save_idefics3(root / name, name) for name in NAMES}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {
        "siglip": save_siglip(root / "siglip"),
        "llama": save_language_model(root / "llama"),
    }


def from_parts(parts: dict[str, Path], **changes: Any) -> Parts:
    """Assembled here, in the shape of the classes; the language model's embedding is tied."""
    section: dict[str, Any] = {
        "encoder": {"name": "siglip", "path": parts["siglip"], "layer": -1},
        "connector": {"name": "pixel_shuffle", "layers": 1, "bias": False},
        "language_model": {"path": parts["llama"]},
        "images": {"tiling": "split", "longest_edge": 64},
    }
    torch.manual_seed(5)
    return assemble({**section, **changes})


@needs_images
@pytest.mark.parametrize("name", NAMES)
def test_reads_what_its_own_class_computes(composites: dict[str, Path], name: str) -> None:
    model, processor = COMPOSITES[name].read(composites[name], torch.float32)
    assert model.config.origin == COMPOSITES[name].name == name
    check_read(name, composites[name], model, processor)
    check_packed(model, processor)


@needs_images
@pytest.mark.parametrize("name", NAMES)
def test_images_may_be_one_view(composites: dict[str, Path], tmp_path: Path, name: str) -> None:
    """do_image_splitting: false scales twice and squashes; the embedding is tied here."""
    folder = save_idefics3(tmp_path / "a", name, tie_word_embeddings=True)
    change_json(folder / "preprocessor_config.json", do_image_splitting=False)
    model, processor = COMPOSITES[name].read(folder, torch.float32)
    check_read(name, folder, model, processor)
    COMPOSITES[name].write(model, processor, tmp_path / "b")
    check_read(name, tmp_path / "b", model, processor)


@needs_images
def test_written_folders_load_without_us(
    composites: dict[str, Path], parts: dict[str, Path], tmp_path: Path
) -> None:
    """Of either name: one read and trained, one assembled, one with a bias that stayed zero."""
    folders: dict[str, tuple[Path, str]] = {}
    made: dict[str, Parts] = {}
    for name in NAMES:
        trained = COMPOSITES[name].read(composites[name], torch.float32)
        train_a_step(*trained)
        biased = from_parts(parts, connector={"name": "pixel_shuffle", "layers": 1})
        these = {"trained": trained, "assembled": from_parts(parts), "biased": biased}
        for kind, (model, processor) in these.items():
            key = f"{name}-{kind}"
            made[key], folders[key] = (model, processor), (tmp_path / key, name)
            COMPOSITES[name].write(model, processor, tmp_path / key)
        again = COMPOSITES[name].read(tmp_path / f"{name}-trained", torch.float32)[0]
        assert same_weights(trained[0], again)
    found = load_alone(folders, tmp_path)
    for key, (model, processor) in made.items():
        check_alone(found, key, model, processor)


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_changes_nothing(
    composites: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model, processor = COMPOSITES[name].read(composites[name], torch.float32)
    COMPOSITES[name].write(model, processor, tmp_path / "a")
    again, processor_again = COMPOSITES[name].read(tmp_path / "a", torch.float32)
    assert same_weights(model, again)
    assert processor.fingerprint == processor_again.fingerprint
    assert model.config.to_dict() == again.config.to_dict()


@needs_images
def test_one_name_is_written_as_the_other(composites: dict[str, Path], tmp_path: Path) -> None:
    model, processor = COMPOSITES["idefics3"].read(composites["idefics3"], torch.float32)
    COMPOSITES["smolvlm"].write(model, processor, tmp_path)
    check_read("smolvlm", tmp_path, model, processor)


def test_cells_that_share_a_position(composites: dict[str, Path]) -> None:
    """The sides of published checkpoints have none; 25 is one that has."""
    assert not any(map(shares_positions, (14, 16, 24, 26, 27, 32)))
    assert [cells for cells in range(1, 41) if shares_positions(cells)] == [19, 25, 29, 31, 38, 40]


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("preprocessor_config.json", {"size": {"longest_edge": 5000}}, "no further than 4096"),
        ("preprocessor_config.json", {"size": 96}, "no longest_edge"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 64}}, "the encoder takes"),
        ("preprocessor_config.json", {"size": {"longest_edge": 224}}, "and 6 of them, 192"),
        (
            "config.json",
            {"text_config": {"num_hidden_layers": 3}},
            "weights of Idefics3ForConditionalGeneration are missing",
        ),
        ("config.json", {"image_token_id": 5}, "by config.json and"),
    ],
)
def test_refuses_a_folder(
    composites: dict[str, Path], tmp_path: Path, file: str, changes: dict[str, Any], match: str
) -> None:
    folder = shutil.copytree(composites["idefics3"], tmp_path / "a")
    change_json(folder / file, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        COMPOSITES["idefics3"].read(folder, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"encoder": {"layer": -2}}, "encoder layer -2"),
        ({"connector": {"name": "mlp"}}, "the connector mlp"),
        ({"connector": {"name": "pixel_shuffle"}}, "layers 2: it has 1"),
        ({"connector": {"name": "pixel_shuffle", "layers": 1, "factor": 3}}, "does not divide"),
        ({"images": {"tiling": "dynamic"}}, "tiling dynamic"),
        ({"images": {}}, "tiling none: it has split"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_refuses_parts_that_it_has_no_place_for(
    parts: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], match: str
) -> None:
    if "encoder" in changes:
        changes = {"encoder": {"name": "siglip", "path": parts["siglip"], **changes["encoder"]}}
    refused(name, *from_parts(parts, **changes), tmp_path / "out", match)


def test_refuses_what_training_made_of_the_parts(parts: dict[str, Path], tmp_path: Path) -> None:
    model, processor = from_parts(parts, connector={"name": "pixel_shuffle", "layers": 1})
    with torch.no_grad():
        model.connector.last_linear().bias.add_(0.1)
    refused("idefics3", model, processor, tmp_path / "out", "bias, which is not zero")
    model, processor = from_parts(parts)
    model.encoder.geometry = type(model.encoder.geometry)(
        **{**model.encoder.geometry.to_dict(), "cells": 40}
    )
    refused("idefics3", model, processor, tmp_path / "out", "40 cells a side")


def refused(
    name: str, model: MultimodalModel, processor: Processor, folder: Path, match: str
) -> None:
    """In one line, and before anything is written."""
    with pytest.raises(ValueError, match=match) as caught:
        COMPOSITES[name].write(model, processor, folder)
    assert "\n" not in str(caught.value)
    assert not folder.exists()
