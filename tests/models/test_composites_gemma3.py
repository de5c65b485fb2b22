"""Gemma 3: images that see themselves both ways, read, packed, written, loaded without us."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_packing.document import Document
from data_packing.pack import collate
from mllm.export import EXPORTS
from mllm.models.composites.gemma3 import GEMMA3, read, write
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.template import ImageText
from tests.models.composite_checks import (
    CLOSE,
    check_alone,
    check_packed,
    check_read,
    conversations,
    inputs_of,
    load_alone,
    logits_of,
    same_weights,
    train_a_step,
)
from tests.models.composite_folders import change_json, save_gemma3
from tests.models.conftest import picture

Parts = tuple[MultimodalModel, Processor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gemma3(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture
def parts(folder: Path) -> Parts:
    return read(folder, torch.float32)


def test_reads_what_its_own_class_computes(folder: Path, parts: Parts) -> None:
    assert parts[0].config.origin == GEMMA3.name == "gemma3"
    assert parts[1].template.renderer.takes_parts
    check_read("gemma3", folder, *parts)
    check_packed(*parts)


def test_images_see_themselves_in_both_directions(parts: Parts) -> None:
    """With the setting off an image's first tokens know nothing of its last ones."""
    model, processor = parts
    document = conversations()[0]
    opened = logits_of(model, processor, document)
    model.config.bidirectional_images = False
    closed = logits_of(model, processor, document)
    assert (opened - closed).abs().max() > 1e-2
    text = conversations()[2]
    model.config.bidirectional_images = True
    opened = logits_of(model, processor, text)
    model.config.bidirectional_images = False
    assert torch.equal(logits_of(model, processor, text), opened)


def test_packed_gradients_equal_unpacked(parts: Parts) -> None:
    model, processor = parts
    samples = [processor.encode(document) for document in conversations()]
    pack = collate(samples, 0)
    found = model(pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens).logits
    found.square().mean().backward()
    packed = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    alone = [model(**inputs_of(sample)).logits[0] for sample in samples]
    torch.cat(alone).square().mean().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name], weight.grad, **CLOSE, msg=name)


def test_nothing_crosses_a_document(parts: Parts) -> None:
    """Images at the end of one document and at the start of the next are two."""
    model, processor = parts
    first = processor.encode(Document.caption(picture(1), "a red chair"))
    others = [processor.encode(Document.caption(picture(n), "the cat")) for n in (2, 3)]
    stop = int((first.input_ids == processor.image_token_id).nonzero()[0][-1]) + 1
    first.input_ids, first.labels = first.input_ids[:stop], first.labels[:stop]
    for sample in others:
        start = int((sample.input_ids == processor.image_token_id).nonzero()[0][0])
        sample.input_ids, sample.labels = sample.input_ids[start:], sample.labels[start:]
        sample.slots = []
    rows = []
    for sample in others:
        pack = collate([first, sample], 0)
        with torch.no_grad():
            logits = model(pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens)
        rows.append(logits.logits[0, :stop])
    assert torch.equal(*rows)


def test_padded_rows_and_beams(parts: Parts) -> None:
    model, processor = parts
    prompts = [Document(document.parts[:-1]) for document in conversations()]
    wrote = []
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        asked = processor.prompts(prompts)
        rows = model.generate(**asked, max_new_tokens=6, do_sample=False, **options)
        together = rows[:, asked["input_ids"].shape[1] :].tolist()
        for prompt, answer in zip(prompts, together, strict=True):
            one = processor.prompt(prompt)
            row = model.generate(**one, max_new_tokens=6, do_sample=False, **options)
            alone = row[0, one["input_ids"].shape[1] :].tolist()
            assert answer[: len(alone)] == alone
        wrote.append(together)
    assert wrote[0] == wrote[2]


def test_what_does_not_know_the_images_is_refused(parts: Parts) -> None:
    model, processor = parts
    asked = processor.prompt(Document(conversations()[0].parts[:-1]))
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        model.generate(**asked, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


def test_written_folders_load_without_us(folder: Path, parts: Parts, tmp_path: Path) -> None:
    train_a_step(*parts)
    write(*parts, tmp_path / "trained")
    found = load_alone({"trained": (tmp_path / "trained", "gemma3")}, tmp_path)
    check_alone(found, "trained", *parts)
    assert same_weights(parts[0], read(tmp_path / "trained", torch.float32)[0])


def test_a_round_trip_changes_nothing(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    write(model, processor, tmp_path / "a")
    again, processor_again = read(tmp_path / "a", torch.float32)
    assert same_weights(model, again)
    assert processor.fingerprint == processor_again.fingerprint
    assert model.config.to_dict() == again.config.to_dict()


def test_our_own_folder_keeps_it(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    document = conversations()[0]
    expected = logits_of(model, processor, document)
    assert torch.equal(logits_of(again, Processor.from_pretrained(tmp_path), document), expected)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mm_tokens_per_image": 9}, "9 tokens of an image cannot be averages"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping is set"),
        ({"text_config": {"use_bidirectional_attention": True}}, "attends to later tokens"),
        ({"image_token_index": 7}, "by config.json and"),
    ],
)
def test_refuses_a_folder(
    folder: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    copied = shutil.copytree(folder, tmp_path / "a")
    change_json(copied / "config.json", **changes)
    with pytest.raises(ValueError, match=match) as caught:
        read(copied, torch.float32)
    assert "\n" not in str(caught.value)


def test_refuses_other_parts(parts: Parts, build: Callable[..., Parts], tmp_path: Path) -> None:
    model, processor = parts
    others = {
        "the encoder clip": build("clip", "gemma3", visual_tokens=4),
        "encoder layer -2": build("siglip", "gemma3", visual_tokens=4),
        "the connector mlp": build("siglip", "mlp", encoder_options={"layer": -1}),
        "the language model llama": build(
            "siglip", "gemma3", encoder_options={"layer": -1}, visual_tokens=4
        ),
    }
    for match, (other, its) in others.items():
        refused(other, its, tmp_path / "out", match)
    model.config.bidirectional_images = False
    refused(model, processor, tmp_path / "out", "see the past alone")


def test_its_own_code_cannot_hold_it(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    text = ImageText(processor.image_token, processor.image_token)
    plain = Processor(
        processor.tokenizer,
        model.encoder.geometry,
        model.config.connector,
        processor.image_token,
        image_text=text,
    )
    with pytest.raises(ValueError, match="see each other in both directions"):
        EXPORTS["transformers"](model, plain, tmp_path / "out")


def refused(model: MultimodalModel, processor: Processor, folder: Path, match: str) -> None:
    """In one line, and before anything is written."""
    with pytest.raises(ValueError, match=match) as caught:
        write(model, processor, folder)
    assert "\n" not in str(caught.value)
    assert not folder.exists()
