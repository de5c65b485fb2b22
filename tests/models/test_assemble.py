"""From a recipe's model section to a model: what is refused, and what comes out."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_packing.pack import collate
from mllm.models.assemble import assemble
from mllm.models.encoders import ENCODERS
from tests.models.conftest import SMALL, chat, documents, save_language_model


def section(folders: dict[str, Path], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "encoder": {"name": "clip", "path": folders["clip"]},
        "connector": {"name": "average_pool", "visual_tokens": 4},
        "language_model": {"path": folders["llama"]},
    }
    return {**values, **changes}


def test_unknown_parts_get_the_nearest_name(folders: dict[str, Path]) -> None:
    for changes, message in (
        ({"encoder": {"name": "clipp", "path": "x"}}, "unknown encoder 'clipp'.*mean 'clip'"),
        ({"connector": {"name": "averagepool"}}, "unknown connector.*mean 'average_pool'"),
        ({"connector": {"name": "mlp", "visual_tokens": 4}}, "unknown option of the connector"),
        ({"language_model": {"path": folders["llama"], "pth": 1}}, "option of language_model"),
        ({"encoder": {"name": "clip"}}, r"model\.encoder\.path is missing"),
        ({"connector": {"visual_tokens": 4}}, r"model\.connector\.name is missing"),
        ({"connector": None}, r"model\.connector is missing"),
        ({"language_model": None}, r"model\.language_model is missing"),
        ({"language_model": {"path": "no/such/folder"}}, "language_model: there is no folder"),
        ({"encoder": {"name": "clip", "path": "./nowhere"}}, "encoder: there is no folder"),
        ({"from": folders["clip"]}, "leave encoder out"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            assemble(section(folders, **changes))
        assert "\n" not in str(refused.value)


def test_damaged_language_models(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(folders["llama"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged or cut short") as refused:
        assemble(section(folders, language_model={"path": folder}))
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="clip"):
        assemble(section(folders, language_model={"path": folders["clip"]}))


def test_weights_that_must_be_unpickled_are_not_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_language_model(tmp_path / "lm")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        assemble(section(folders, language_model={"path": folder}))


def test_from_a_folder(build: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = build("clip", "average_pool")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for values in (
        {"from": tmp_path},
        {"from_": str(tmp_path), "connector": {"init": "ridge"}, "encoder": None},
        {"from": tmp_path, "connector": {"visual_tokens": 16}},
    ):
        again, _ = assemble(values)
        assert torch.equal(again.connector.first.weight, model.connector.first.weight)


def test_sections_may_be_pydantic(folders: dict[str, Path]) -> None:
    from mllm.recipe import ModelSection

    made = ModelSection.model_validate(
        {
            "encoder": {"name": "clip", "path": str(folders["clip"])},
            "connector": {"name": "average_pool", "visual_tokens": 4, "init": "ridge"},
            "language_model": {"path": str(folders["llama"])},
        }
    )
    model, processor = assemble(made)
    assert model.config.connector == {"name": "average_pool", "visual_tokens": 4}
    assert processor.connector == model.config.connector


def test_bf16_throughout(folders: dict[str, Path]) -> None:
    model, processor = assemble(section(folders), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    pack = collate([processor.encode(one) for one in documents()], 0)
    hidden = model.hidden_states(
        pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
    )
    assert hidden.dtype == torch.bfloat16
    assert hidden.isfinite().all()


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_without_weights_everything_is_as_with_them(
    folders: dict[str, Path], build: Callable[..., Any], encoder: str
) -> None:
    if encoder == "timm":
        pytest.skip("it has its own folders, see test_timm_backbone.py")
    encoders: dict[str, Any] = {"name": encoder, "path": folders.get(encoder)}
    if encoder == "blip2":
        encoders["class_cell"] = False  # connectors that pool need the grid
    if encoder == "pair":
        parts = {name: {"name": name, "path": folders[name]} for name in ("siglip", "dinov2")}
        encoders = {"name": "pair", "first": parts["siglip"], "second": parts["dinov2"]}
    for connector, options in SMALL.items():
        values = section(folders, encoder=encoders, connector={"name": connector, **options})
        model, processor = assemble(values)
        plan, again = assemble(values, weights=False)
        assert {parameter.device.type for parameter in plan.parameters()} == {"meta"}
        shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        assert {name: (p.shape, p.dtype) for name, p in plan.named_parameters()} == shapes
        assert again.fingerprint == processor.fingerprint


def test_the_processor_travels_to_workers(build: Callable[..., Any]) -> None:
    _, processor = build("clip", "average_pool")
    data = pickle.dumps(processor)
    assert len(data) < 200_000
    again = pickle.loads(data)
    one, other = processor.encode(chat(1)), again.encode(chat(1))
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert again.fingerprint == processor.fingerprint


def test_fingerprints_follow_what_matters(build: Callable[..., Any], tmp_path: Path) -> None:
    _, first = build("clip", "average_pool", visual_tokens=4)
    _, tokens = build("clip", "average_pool", visual_tokens=16)
    _, padded = build("clip", "average_pool", encoder_options={"resize": "pad"})
    other = save_language_model(tmp_path / "lm", chat_template="{{ messages[0]['content'] }}")
    _, template = build("clip", "average_pool", other)
    assert len({one.fingerprint for one in (first, tokens, padded, template)}) == 4
    assert first.text_fingerprint == tokens.text_fingerprint == padded.text_fingerprint
    assert first.text_fingerprint != template.text_fingerprint


def test_the_command_does_not_wait_for_torch() -> None:
    code = "import sys; sys.argv = ['/usr/bin/mllm']; import mllm; print('torch' in sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert time.monotonic() - start < 30
