"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision: from parts, from their folders, and out again."""

from __future__ import annotations

import io
import json
import random
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
)

from data_packing.document import Document, Image
from data_packing.pack import collate
from mllm.models.assemble import assemble, load
from mllm.models.composites import COMPOSITES
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models import llava_folders
from tests.models.begin_tokenizers import BEGIN, begin_tokenizer
from tests.models.composite_checks import (
    ask_classes,
    check_answers,
    messages_in_files,
    same_weights,
)
from tests.models.conftest import CHATML, Parts, picture
from tests.models.llava_folders import SAVERS

ASSEMBLED = {
    "llava_assembled": ("siglip", {}),
    "llava_next_assembled": ("clip", {"tiling": "any_resolution"}),
    "llava_onevision_assembled": ("siglip", {"tiling": "any_resolution", "tiles": 12}),
}
"""Name → encoder and `images:` of a model that never was a folder of theirs."""

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_siglip": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}


def composite(name: str) -> str:
    """The class's key in COMPOSITES."""
    return name.removesuffix("_siglip").removesuffix("_assembled")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their folders by name."""
    root = tmp_path_factory.mktemp("llava")
    return {name: save(root / name) for name, save in SAVERS.items()}


def questions() -> list[Document]:
    """One image, several turns with two images of other shapes, none."""
    one = Document.conversation([("user", [picture(4), "What is this?"])])
    tall, wide = picture(1, 90, 41), picture(2, 33, 100)
    more = Document.conversation(
        [
            ("user", [tall, "a small green parrot"]),
            ("assistant", ["It is a dog."]),
            ("user", [wide, "Which room?"]),
        ]
    )
    text = Document.conversation([("user", ["Which room does it belong to?"])])
    return [one, more, text]


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    result: Tensor = model.eval()(**inputs).logits
    return result


def train_one_step(model: MultimodalModel, processor: Processor) -> None:
    """One packed step on all weights."""
    answers = [("assistant", ["It is a dog."])]
    document = Document.conversation([("user", [picture(4), "What is this?"]), *answers])
    samples = [processor.encode(document), processor.encode(document)]
    pack = collate(samples, 0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(
        input_ids=pack.input_ids,
        pixels=pack.pixels,
        sizes=pack.sizes,
        order=pack.order,
        bags=pack.bags,
        cu_seqlens=pack.cu_seqlens,
        labels=pack.labels,
    ).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("name", SAVERS)
def test_a_folder_gives_the_ids_and_logits_of_its_class(
    theirs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    model, processor = load(theirs[name])
    own = AutoModelForImageTextToText.from_pretrained(theirs[name])
    assert type(own).__name__ == CLASSES[name]
    assert model.config.origin == composite(name)
    if name == "llava_onevision":  # its processor needs torchvision; see the tests of tiles below
        COMPOSITES["llava_onevision"].write(model, processor, tmp_path)
    their_processor = AutoProcessor.from_pretrained(
        tmp_path if name == "llava_onevision" else theirs[name]
    )
    for document in questions():
        mine = processor.prompt(document)
        inputs = their_processor.apply_chat_template(
            messages_in_files(document, tmp_path),
            chat_template=processor.tokenizer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert mine["input_ids"].tolist() == inputs["input_ids"].tolist()
        torch.testing.assert_close(logits(model, mine), logits(own, inputs), rtol=0, atol=1e-5)


def test_the_template_of_a_folder_keeps_its_begin_token(
    theirs: dict[str, Path], tmp_path: Path
) -> None:
    processor = load(theirs["llava"])[1]
    own = AutoProcessor.from_pretrained(theirs["llava"])
    for document in questions():
        inputs = own.apply_chat_template(
            messages_in_files(document, tmp_path),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        mine = processor.prompt(document)["input_ids"]
        assert mine.tolist() == inputs["input_ids"]
        assert mine[0].tolist().count(1) == 1


def test_parts_of_a_llava_make_the_same_model(theirs: dict[str, Path], tmp_path: Path) -> None:
    own: Any = LlavaForConditionalGeneration.from_pretrained(theirs["llava"])
    own.model.vision_tower.save_pretrained(tmp_path / "clip")
    assert isinstance(own.model.vision_tower, CLIPVisionModel)
    preprocessor = (theirs["llava"] / "preprocessor_config.json").read_bytes()
    (tmp_path / "clip" / "preprocessor_config.json").write_bytes(preprocessor)
    language_model: Any = LlamaForCausalLM(own.config.text_config)
    language_model.model.load_state_dict(own.model.language_model.state_dict())
    language_model.save_pretrained(tmp_path / "llama")
    llava_folders.tokenizer_with_begin(llava_folders.VICUNA).save_pretrained(tmp_path / "llama")
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": tmp_path / "clip", "layer": -2},
            "connector": {"name": "mlp", "norm": False},
            "language_model": {"path": tmp_path / "llama"},
        }
    )
    projector = own.model.multi_modal_projector
    model.connector.first.load_state_dict(projector.linear_1.state_dict())  # type: ignore[operator,union-attr]
    model.connector.second.load_state_dict(projector.linear_2.state_dict())  # type: ignore[operator,union-attr]
    mine = processor.prompt(questions()[1])
    inputs = AutoProcessor.from_pretrained(theirs["llava"])(
        text="<image>" * 2,
        images=[PillowImage.open(io.BytesIO(one.data)) for one in questions()[1].images],
        return_tensors="pt",
    )
    inputs["input_ids"], inputs["attention_mask"] = mine["input_ids"], mine["attention_mask"]
    torch.testing.assert_close(logits(model, mine), logits(own, inputs), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def trained(theirs: dict[str, Path], folders: dict[str, Path]) -> dict[str, Parts]:
    """Each of them after a packed step, and models that were assembled here."""
    result = {}
    for name, folder in theirs.items():
        model, processor = load(folder)
        before = load(folder)[0]
        train_one_step(model, processor)
        assert not same_weights(model, before)
        result[name] = (model, processor)
    for name, (encoder, images) in ASSEMBLED.items():
        torch.manual_seed(6)
        result[name] = assemble(
            {
                "encoder": {"name": encoder, "path": folders[encoder]},
                "connector": {"name": "mlp", "norm": False},
                "language_model": {"path": folders["llama"]},
                "images": images,
            }
        )
    return result


@pytest.fixture(scope="module")
def written(trained: dict[str, Parts], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their folders after a packed step."""
    root = tmp_path_factory.mktemp("written")
    for name, (model, processor) in trained.items():
        COMPOSITES[composite(name)].write(model, processor, root / name)
    return {name: root / name for name in trained}


def test_what_was_trained_is_at_home_in_its_class(
    trained: dict[str, Parts], written: dict[str, Path], tmp_path: Path
) -> None:
    asked = [{"messages": messages_in_files(one, tmp_path)} for one in questions()]
    jobs = {name: (folder, composite(name), asked) for name, folder in written.items()}
    for name, found in ask_classes(jobs, tmp_path).items():
        assert found["class"] == CLASSES[composite(name)]
        check_answers(found, questions(), *trained[name])


@pytest.mark.parametrize("name", [*SAVERS, *ASSEMBLED])
def test_a_round_trip_changes_no_bit(
    trained: dict[str, Parts], written: dict[str, Path], name: str
) -> None:
    again, processor = load(written[name])
    assert same_weights(trained[name][0], again)
    for key in ("name", "layer", "geometry"):
        assert again.config.encoder[key] == trained[name][0].config.encoder[key]
    for document in questions():
        first = trained[name][1].prompt(document)
        for key, value in processor.prompt(document).items():
            assert torch.equal(value, first[key])


@pytest.mark.parametrize("name", SAVERS)
def test_written_names_are_those_of_the_class(written: dict[str, Path], name: str) -> None:
    own = AutoModelForImageTextToText.from_pretrained(written[name])
    with safe_open(written[name] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names <= set(own.state_dict())
    assert {one.split(".")[1] for one in names if one != "lm_head.weight"} <= {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
        "image_newline",
    }


def shapes() -> list[tuple[int, int]]:
    """(height, width) of images: squares, strips down to one pixel, and anything else."""
    chosen = random.Random(3)
    some = [(chosen.randint(1, 200), chosen.randint(1, 200)) for _ in range(12)]
    return [(32, 32), (1, 9), (9, 1), (1, 1), (96, 32), *some]


def image(height: int, width: int) -> Image:
    """Noise, so that every pixel counts."""
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "PNG")
    return Image.from_bytes(buffer.getvalue())


@pytest.mark.parametrize("name", [*SAVERS, *ASSEMBLED])
def test_images_of_any_size_give_the_same_pixels(
    trained: dict[str, Parts], written: dict[str, Path], name: str
) -> None:
    model, processor = trained[name]
    own = AutoProcessor.from_pretrained(written[name])
    for height, width in shapes():
        if name == "llava" and max(height, width) > 16 * min(height, width):
            continue  # a strip is cut before it is scaled
        shown = image(height, width)
        mine = processor.prompt(Document.conversation([("user", [shown, "the"])]))
        picture_ = PillowImage.open(io.BytesIO(shown.data))
        found = own.image_processor(picture_, return_tensors="pt")["pixel_values"].flatten(0, -4)
        squares = model.encoder.squares(mine["pixels"], mine["sizes"])
        expected = model.encoder.normalised(squares).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_onevision_s_own_preprocessing_of_one_image_is_ours(trained: dict[str, Parts]) -> None:
    model, processor = trained["llava_onevision"]
    points = [[32 * rows, 32 * columns] for rows, columns in processor.geometry.grids]  # type: ignore[attr-defined]
    own = LlavaOnevisionImageProcessorPil(
        size=llava_folders.SQUARE,
        image_mean=list(model.encoder.mean),
        image_std=list(model.encoder.std),
        image_grid_pinpoints=points,
    )
    for height, width in shapes():
        shown = image(height, width)
        mine = processor.prompt(Document.conversation([("user", [shown, "the"])]))
        found = own(PillowImage.open(io.BytesIO(shown.data)), return_tensors="pt")
        squares = model.encoder.normalised(model.encoder.squares(mine["pixels"], mine["sizes"]))
        expected = squares.permute(0, 3, 1, 2)
        torch.testing.assert_close(found["pixel_values"][0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*SAVERS, *ASSEMBLED])
def test_a_map_of_many_tiles_is_not_scaled(
    trained: dict[str, Parts], written: dict[str, Path], name: str
) -> None:
    """Of all the grids that a model has, also of more tiles than the nine of the published rule."""
    model, processor = trained[name]
    own: Any = AutoModelForImageTextToText.from_pretrained(written[name])
    high, wide = max(getattr(processor.geometry, "grids", [(1, 1)]), key=prod)
    asked = processor.prompt(
        Document.conversation([("user", [picture(4, 32 * high, 32 * wide), "What is this?"])])
    )
    squares = model.encoder.normalised(model.encoder.squares(asked["pixels"], asked["sizes"]))
    inputs = {"input_ids": asked["input_ids"], "pixel_values": squares.permute(0, 3, 1, 2)}
    if not isinstance(own, LlavaForConditionalGeneration):
        inputs["pixel_values"] = inputs["pixel_values"][None]
        inputs["image_sizes"] = torch.tensor([[32 * high, 32 * wide]])
    torch.testing.assert_close(logits(model, asked), logits(own, inputs), rtol=0, atol=1e-5)
    if "onevision" not in name:
        assert own.config.image_seq_length == model.encoder.geometry.cells**2


def test_the_outer_configuration_says_whether_embeddings_are_tied(tmp_path: Path) -> None:
    folder = llava_folders.save_llava_next(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder)
    own: Any = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(model.get_output_embeddings().weight, own.lm_head.weight)  # type: ignore[arg-type]
    assert not torch.equal(own.lm_head.weight, own.get_input_embeddings().weight)


def test_dtype_is_the_folder_s_or_the_one_asked_for(tmp_path: Path) -> None:
    folder = llava_folders.save_llava(tmp_path / "f", dtype=torch.bfloat16)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json"):
        (tmp_path / "half" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "half" / "tokenizer_config.json").write_bytes(
        (folder / "tokenizer_config.json").read_bytes()
    )
    assert {p.dtype for p in load(tmp_path / "half")[0].parameters()} == {torch.bfloat16}
    asked = load(tmp_path / "half", dtype=torch.float32)[0]
    assert {p.dtype for p in asked.parameters()} == {torch.float32}


def test_a_recipe_begins_from_a_folder(theirs: dict[str, Path], tmp_path: Path) -> None:
    model, processor = assemble({"from": str(theirs["llava"])})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert same_weights(model, again)
    assert again.config.origin == "llava"
    with pytest.raises(ValueError, match="cannot become"):
        assemble({"from": str(theirs["llava"]), "connector": {"hidden": 4}})


def test_a_template_without_a_begin_token_is_written_so(
    theirs: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = load(theirs["llava"])
    tokenizer: Any = processor.tokenizer
    tokenizer.chat_template = llava_folders.VICUNA
    mine = Processor(tokenizer, processor.geometry, processor.connector)
    COMPOSITES["llava"].write(model, mine, tmp_path / "out")
    own = AutoProcessor.from_pretrained(tmp_path / "out")
    for document in questions():
        inputs = own.apply_chat_template(
            messages_in_files(document, tmp_path),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        assert inputs["input_ids"] == mine.prompt(document)["input_ids"].tolist()


def test_a_template_of_texts_gets_its_begin_token(tmp_path: Path) -> None:
    llava_folders.save_llava(tmp_path)
    tokenizer = begin_tokenizer(True, CHATML)  # fails on parts
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    _, processor = load(tmp_path)
    for document in questions():
        ids = processor.prompt(document)["input_ids"][0].tolist()
        text = processor.tokenizer.decode(ids)
        assert text.startswith(f"{BEGIN}<|im_start|>")
        assert text.count(BEGIN) == 1
        assert (processor.image_token_id in ids) is bool(document.images)
