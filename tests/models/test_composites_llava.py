"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision: from parts, from their folders, and out again."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    CohereConfig,
    CohereForCausalLM,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    PhiConfig,
    PhiForCausalLM,
)

from data_packing.document import Document, Image
from data_packing.pack import collate
from mllm.models.assemble import assemble, load
from mllm.models.composites import COMPOSITES
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.turns import turns_of
from tests.models import llava_folders, outside_process
from tests.models.conftest import SMALL, Parts, make_tokenizer, picture

SAVERS: dict[str, Callable[..., Path]] = {
    "llava": llava_folders.save_llava,
    "llava_siglip": llava_folders.save_llava_siglip,
    "llava_next": llava_folders.save_llava_next,
    "llava_onevision": llava_folders.save_llava_onevision,
}
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


def messages(document: Document, scratch: Path) -> list[dict[str, Any]]:
    """The same conversation as transformers' users write it, images as files."""
    images = iter(document.images)
    result = []
    for turn in turns_of(document):
        parts: list[dict[str, Any]] = turn.as_parts()
        for part in parts:
            if part["type"] == "image":
                data = next(images).data
                part["path"] = str(scratch / f"{abs(hash(data))}.png")
                Path(part["path"]).write_bytes(data)
        result.append({"role": turn.role, "content": parts})
    return result


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


def same(first: MultimodalModel, second: MultimodalModel) -> bool:
    """Whether two models have the same weights, bit by bit."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
            messages(document, tmp_path),
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
            messages(document, tmp_path),
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
        assert not same(model, before)
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
    wanted, jobs = [], []
    for name, folder in written.items():
        for document in questions():
            jobs.append({"folder": str(folder), "messages": messages(document, tmp_path)})
            wanted.append((name, document))
    for (name, document), found in zip(wanted, outside_process.run(jobs, tmp_path), strict=True):
        model, processor = trained[name]
        mine = processor.prompt(document)
        assert found["class"] == CLASSES[composite(name)]
        assert found["ids"].tolist() == mine["input_ids"].tolist()
        torch.testing.assert_close(found["logits"], logits(model, mine), rtol=0, atol=1e-5)
        new = model.generate(**mine, max_new_tokens=8, do_sample=False)
        assert found["new"].tolist() == new[:, mine["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", [*SAVERS, *ASSEMBLED])
def test_a_round_trip_changes_no_bit(
    trained: dict[str, Parts], written: dict[str, Path], name: str
) -> None:
    again, processor = load(written[name])
    assert same(trained[name][0], again)
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


def test_the_outer_configuration_says_whether_embeddings_are_tied(tmp_path: Path) -> None:
    folder = llava_folders.save_llava_next(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder)
    own: Any = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(model.get_output_embeddings().weight, own.lm_head.weight)  # type: ignore[arg-type]
    assert not torch.equal(own.lm_head.weight, own.get_input_embeddings().weight)


def test_onevision_leaves_out_grids_that_it_would_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor = load(llava_folders.save_llava_onevision(tmp_path))[1]
    grids = processor.geometry.grids  # type: ignore[attr-defined]
    assert "at most 9 tiles" in caplog.text
    assert {(3, 3), (2, 4)} < set(grids)
    assert (3, 4) not in grids


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
    assert same(model, again)
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
            messages(document, tmp_path),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        assert inputs["input_ids"] == mine.prompt(document)["input_ids"].tolist()


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save", "changes", "message"),
    [
        ("llava", {"vision_feature_layer": [-2, -3]}, "several layers side by side"),
        ("llava", {"vision_feature_layer": -9}, "no such layer"),
        ("llava", {"vision_feature_select_strategy": "full"}, "keeps the class token"),
        ("llava", {"projector_hidden_act": "relu"}, "a projector with relu"),
        ("llava_siglip", {"vision_feature_select_strategy": "default"}, "cuts off a patch"),
        ("llava_next", {"image_grid_pinpoints": [[32, 50]]}, "not whole tiles of 32 pixels"),
        ("llava_onevision", {"vision_aspect_ratio": "square"}, "vision_aspect_ratio 'square'"),
        ("llava", {"image_token_index": 319}, "images are the token 319"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, save: str, changes: dict[str, Any], message: str
) -> None:
    folder = SAVERS[save](tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_another_tower_is_not_read(tmp_path: Path) -> None:
    folder = llava_folders.save_llava(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {"model_type": "pixtral"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a vision tower of type 'pixtral'"):
        load(folder)


def test_tiles_that_are_scaled_and_cut_again_are_not_read(tmp_path: Path) -> None:
    folder = llava_folders.save_llava_next(tmp_path)
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "size": {"shortest_edge": 40}}))
    with pytest.raises(ValueError, match="scales tiles to 40 pixels and cuts 32"):
        load(folder)


def test_llava_s_own_padding_is_not_read(tmp_path: Path) -> None:
    folder = llava_folders.save_llava(tmp_path)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_pad": True}))
    with pytest.raises(ValueError, match="do_pad"):
        load(folder)


def test_missing_and_torn_weights_are_named(tmp_path: Path) -> None:
    folder = llava_folders.save_llava_siglip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "linear_1" in name)
    save_file(
        {k: v for k, v in weights.items() if k != name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="1 weights of LlavaForConditionalGeneration are missing"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="damaged or cut short"):
        load(folder)


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fuyu"}))
    with pytest.raises(ValueError, match="'fuyu' model, neither one .* to begin from .*llava"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("to", "encoder", "options", "connector", "message"),
    [
        ("llava", "dinov2", {}, {"norm": False}, "the encoder dinov2 cannot be written"),
        ("llava", "siglip", {"layer": -1}, {"norm": False}, "before their final normalisation"),
        ("llava", "clip", {"resize": "pad"}, {"norm": False}, "padded to squares here"),
        ("llava", "clip", {}, {"hidden": 8, "norm": False}, "as wide as the language model, 32"),
        ("llava", "clip", {}, {}, "has a LayerNorm before it"),
        ("llava", "clip", {}, {"name": "linear"}, "has linear"),
        ("llava", "clip", {}, {"name": "q_former"}, "has q_former"),
        ("llava_next", "clip", {}, {"norm": False}, "cuts images by none"),
    ],
)
def test_what_cannot_be_written(
    folders: dict[str, Path],
    tmp_path: Path,
    to: str,
    encoder: str,
    options: dict[str, Any],
    connector: dict[str, Any],
    message: str,
) -> None:
    name = connector.get("name", "mlp")
    model, processor = assemble(
        {
            "encoder": {"name": encoder, "path": folders[encoder], **options},
            "connector": {"name": name, **SMALL.get(name, {}), **connector},
            "language_model": {"path": folders["llama"]},
        }
    )
    with pytest.raises(ValueError, match=message):
        COMPOSITES[to].write(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "images", "message"),
    [
        ("llava", {"tiling": "dynamic"}, "no tiles, this model cuts images by dynamic"),
        ("llava", {"regions": "feature"}, "no features of regions"),
    ],
)
def test_tilings_that_cannot_be_written(
    folders: dict[str, Path], tmp_path: Path, to: str, images: dict[str, Any], message: str
) -> None:
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp", "norm": False},
            "language_model": {"path": folders["llama"]},
            "images": images,
        }
    )
    with pytest.raises(ValueError, match=message):
        COMPOSITES[to].write(model, processor, tmp_path / "out")


@pytest.mark.parametrize("to", ["llava", "blip-2"])
def test_other_fusions_cannot_be_written(folders: dict[str, Path], tmp_path: Path, to: str) -> None:
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp", "norm": False},
            "language_model": {"path": folders["llama"]},
            "fusion": {"name": "cross_attention"},
        }
    )
    with pytest.raises(ValueError, match="this model's fusion is cross_attention"):
        COMPOSITES[to].write(model, processor, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "message"), [("cohere", "scales or caps its logits"), ("phi", "has a bias")]
)
def test_language_models_that_cannot_be_written(
    folders: dict[str, Path], tmp_path: Path, family: str, message: str
) -> None:
    sizes = {k: v for k, v in llava_folders.TEXT.items() if k != "num_key_value_heads"}
    kind, config = {
        "cohere": (CohereForCausalLM, CohereConfig),
        "phi": (PhiForCausalLM, PhiConfig),
    }[family]
    more = {"logit_scale": 0.5} if family == "cohere" else {}
    kind(config(**sizes, **more)).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": folders["clip"]},
            "connector": {"name": "mlp", "norm": False},
            "language_model": {"path": tmp_path / "lm"},
        }
    )
    with pytest.raises(ValueError, match=message):
        COMPOSITES["llava"].write(model, processor, tmp_path / "out")
