"""BLIP-2: from parts, from its folder, and out again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PillowImage
from torch import Tensor
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    OPTForCausalLM,
)

from data_packing.document import Document, Image, Text
from data_packing.pack import collate
from mllm.models.assemble import assemble, load
from mllm.models.composites import COMPOSITES
from mllm.models.modeling import MultimodalModel
from tests.models.composite_checks import (
    ask_classes,
    check_answers,
    messages_in_files,
    same_weights,
)
from tests.models.composite_folders import CHATML_PARTS
from tests.models.conftest import CHATML, SMALL, Parts, make_tokenizer, picture
from tests.models.llava_folders import save_blip2

QUESTION = "Which room does it belong to?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    return save_blip2(tmp_path_factory.mktemp("blip2"))


def caption(seed: int, text: str, height: int = 40, width: int = 56) -> Document:
    return Document.caption(picture(seed, height, width), text)


def pillow(image: Image) -> PillowImage.Image:
    return PillowImage.open(io.BytesIO(image.data))


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    result: Tensor = model.eval()(**inputs).logits
    return result


def train_one_step(model: MultimodalModel, samples: list[Any]) -> None:
    """One packed step on all weights."""
    pack = collate(samples, 0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(
        input_ids=pack.input_ids,
        pixels=pack.pixels,
        sizes=pack.sizes,
        cu_seqlens=pack.cu_seqlens,
        labels=pack.labels,
    ).loss.backward()
    optimizer.step()
    model.eval()


def chat_parts(folder: Path, root: Path) -> dict[str, Any]:
    """A recipe's parts: the tower and the Q-Former of the folder, its OPT with a chat template."""
    own: Any = Blip2ForConditionalGeneration.from_pretrained(folder)
    own.language_model.save_pretrained(root / "opt")
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(root / "opt")
    return {
        "encoder": {"name": "blip2", "path": folder},
        "connector": {"name": "q_former", "path": str(folder)},
        "language_model": {"path": root / "opt"},
    }


def test_parts_of_a_blip2_make_the_same_model(folder: Path, tmp_path: Path) -> None:
    own: Any = Blip2ForConditionalGeneration.from_pretrained(folder)
    assert isinstance(own.language_model, OPTForCausalLM)
    model, processor = assemble(chat_parts(folder, tmp_path))
    ids = processor.prompt(Document.conversation([("user", [picture(4), QUESTION])]))
    inputs = AutoProcessor.from_pretrained(folder)(pillow(picture(4)), "the", return_tensors="pt")
    inputs["input_ids"], inputs["attention_mask"] = ids["input_ids"], ids["attention_mask"]
    torch.testing.assert_close(logits(model, ids), logits(own, inputs), rtol=0, atol=1e-5)


def test_without_its_class_token_the_q_former_reads_something_else(
    folder: Path, tmp_path: Path
) -> None:
    parts = chat_parts(folder, tmp_path)
    with_token, processor = assemble(parts)
    without, _ = assemble({**parts, "encoder": {**parts["encoder"], "class_cell": False}})
    ids = processor.prompt(Document.conversation([("user", [picture(4), QUESTION])]))
    assert without.encoder.grid(32, 32) == (4, 4)
    assert with_token.encoder.grid(32, 32) == (1, 17)
    assert (logits(with_token, ids) - logits(without, ids)).abs().max() > 1e-3


def test_a_folder_gives_the_ids_and_logits_of_its_class(folder: Path) -> None:
    model, processor = load(folder)
    own_model = Blip2ForConditionalGeneration.from_pretrained(folder)
    own_processor = AutoProcessor.from_pretrained(folder)
    for seed, size in enumerate([(40, 56), (7, 90), (33, 32)]):
        document = caption(seed, QUESTION, *size)
        mine = processor.prompt(document)
        inputs = own_processor(pillow(document.images[0]), QUESTION, return_tensors="pt")
        assert mine["input_ids"].tolist() == inputs["input_ids"].tolist()
        torch.testing.assert_close(
            logits(model, mine), logits(own_model, inputs), rtol=0, atol=1e-5
        )


def test_the_begin_token_stands_after_leading_images(folder: Path) -> None:
    processor = load(folder)[1]
    image, begin, end = [processor.image_token_id] * 3, 1, 2
    later = processor.encode(Document((Text("the", None), picture(1)), "a", "1")).input_ids
    assert later[0] == begin
    assert later[-4:].tolist() == [*image, end]
    alone = processor.encode(Document((picture(1),), "a", "2"))
    assert alone.input_ids.tolist() == [*image, begin, end]
    two = processor.encode(Document((picture(1), picture(2), Text("the", None)), "a", "3"))
    assert two.input_ids[:7].tolist() == [*image, *image, begin]
    assert two.labels[:7].tolist() == [-100] * 7
    assert two.labels[7] == two.input_ids[7]
    cost = processor.cost(caption(3, QUESTION))
    length = len(processor.encode(caption(3, QUESTION)).input_ids)
    assert cost.overhead + sum(text for text, _ in cost.pieces) + 3 == length


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    """The folder's model and one with a chat template, after a packed step each."""
    captioner, captions = load(folder)
    train_one_step(captioner, [captions.encode(caption(seed, QUESTION)) for seed in (1, 2)])
    talker, chats = assemble(chat_parts(folder, tmp_path_factory.mktemp("parts")))
    turns: Any = [("user", [picture(1), QUESTION]), ("assistant", ["the red room"])]
    train_one_step(talker, [chats.encode(Document.conversation(turns))] * 2)
    assert not same_weights(captioner, load(folder)[0])
    return {"caption": (captioner, captions), "chat": (talker, chats)}


@pytest.fixture(scope="module")
def written(trained: dict[str, Parts], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their folders after a packed step."""
    root = tmp_path_factory.mktemp("written")
    for name, (model, processor) in trained.items():
        COMPOSITES["blip-2"].write(model, processor, root / name)
    return {name: root / name for name in trained}


def conversations() -> list[Document]:
    one = Document.conversation([("user", [picture(4), QUESTION])])
    two: Any = [
        ("user", [picture(1, 90, 41), "What is this?"]),
        ("assistant", ["It is a dog."]),
        ("user", [picture(2, 33, 100), QUESTION]),
    ]
    return [one, Document.conversation(two)]


def test_what_was_trained_is_at_home_in_its_class(
    trained: dict[str, Parts], written: dict[str, Path], tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(picture(3).data)
    documents = {"caption": [caption(3, QUESTION)], "chat": conversations()}
    asked = {
        "caption": [{"image": str(image), "text": QUESTION}],
        "chat": [{"messages": messages_in_files(one, tmp_path)} for one in documents["chat"]],
    }
    jobs = {name: (written[name], "blip-2", asked[name]) for name in asked}
    for name, found in ask_classes(jobs, tmp_path).items():
        assert found["class"] == "Blip2ForConditionalGeneration"
        check_answers(found, documents[name], *trained[name])


def test_a_folder_with_a_chat_template_talks_in_its_class_as_in_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_blip2(tmp_path / "given")
    (folder / "chat_template.jinja").write_text(CHATML_PARTS.replace("IMAGE", "'<image>'"))
    model, processor = load(folder)
    assert processor.template.image_text.before_begin
    turns: Any = [("user", [picture(1), QUESTION]), ("assistant", ["the red room"])]
    train_one_step(model, [processor.encode(Document.conversation(turns))] * 2)
    COMPOSITES["blip-2"].write(model, processor, tmp_path / "out")
    assert "puts the tokens of an image behind the begin token of a caption" in caplog.text
    asked = [{"messages": messages_in_files(one, tmp_path)} for one in conversations()]
    jobs = {"chat": (tmp_path / "out", "blip-2", asked)}
    check_answers(ask_classes(jobs, tmp_path)["chat"], conversations(), model, processor)
    again = load(tmp_path / "out")[1]
    for document in conversations():
        ids = processor.prompt(document)["input_ids"]
        assert again.prompt(document)["input_ids"].equal(ids)


@pytest.mark.parametrize("name", ["caption", "chat"])
def test_a_round_trip_changes_no_bit(
    trained: dict[str, Parts], written: dict[str, Path], name: str
) -> None:
    model, processor = trained[name]
    again, own = load(written[name])
    assert same_weights(model, again)
    assert again.config.encoder == model.config.encoder
    assert again.config.connector == model.config.connector
    for document in conversations() if name == "chat" else [caption(1, QUESTION)]:
        assert processor.prompt(document)["input_ids"].equal(own.prompt(document)["input_ids"])


def test_a_stage_s_folder_keeps_where_images_stand(folder: Path, tmp_path: Path) -> None:
    model, processor = load(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, own = load(tmp_path)
    assert own.template.image_text.before_begin
    assert again.config.origin == "blip2"
    assert own.fingerprint == processor.fingerprint
    ids = processor.prompt(caption(1, QUESTION))["input_ids"]
    assert own.prompt(caption(1, QUESTION))["input_ids"].equal(ids)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "t5", "d_model": 8}}, "t5, an encoder and a decoder"),
        ({"image_token_index": None}, "has no image_token_index"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save_blip2(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("encoder", "connector", "message"),
    [
        ({"name": "clip"}, {"name": "q_former"}, "this model's is clip"),
        ({"name": "blip2", "layer": -2}, {"name": "q_former"}, "without its last layers"),
        ({"name": "blip2", "class_cell": False}, {"name": "q_former"}, "class_cell"),
        ({"name": "blip2"}, {"name": "mlp"}, "its connector is q_former, this model's is mlp"),
        ({"name": "blip2"}, {"name": "q_former", "text": True}, "its Q-Former reads no text"),
    ],
)
def test_what_cannot_be_written(
    folder: Path,
    folders: dict[str, Path],
    tmp_path: Path,
    encoder: dict[str, Any],
    connector: dict[str, Any],
    message: str,
) -> None:
    path = folder if encoder["name"] == "blip2" else folders[encoder["name"]]
    model, processor = assemble(
        {
            "encoder": {**encoder, "path": path},
            "connector": {**connector, **SMALL.get(connector["name"], {})},
            "language_model": {"path": folders["llama"]},
        }
    )
    with pytest.raises(ValueError, match=message):
        COMPOSITES["blip-2"].write(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tiles_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    parts = chat_parts(folder, tmp_path)
    model, processor = assemble({**parts, "images": {"tiling": "dynamic", "tiles": 2}})
    with pytest.raises(ValueError, match="no tiles, this model cuts images by dynamic"):
        COMPOSITES["blip-2"].write(model, processor, tmp_path / "out")


def test_a_pair_takes_it_only_with_places(folder: Path, folders: dict[str, Path]) -> None:
    section = {"name": "blip2", "path": str(folder)}
    parts = {
        "encoder": {
            "name": "pair",
            "first": {"name": "clip", "path": str(folders["clip"])},
            "second": section,
        },
        "connector": {"name": "mlp"},
        "language_model": {"path": folders["llama"]},
    }
    with pytest.raises(ValueError, match="second: the class token has no place on a grid"):
        assemble(parts)
    section["class_cell"] = False  # type: ignore[assignment]
    assert assemble(parts)[0].encoder.grid(32, 32) == (4, 4)


def test_an_instructblip_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "instructblip"}))
    with pytest.raises(ValueError, match=r"vocabulary of its own.*text: true") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
