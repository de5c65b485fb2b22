"""Boxes in the text, as numbers and as features; clips within a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_packing.document import Box, Document, DocumentError, Text
from data_packing.index import build_index
from data_packing.loader import Loader
from data_packing.pack import Pack, collate
from data_packing.plan import Plan
from data_packing.sharding import write_shards
from mllm.models.assemble import load
from mllm.models.geometry import ImageGeometry
from mllm.models.images import Images
from mllm.models.modeling import MultimodalModel
from mllm.models.regions import STYLES, inside, spelled
from mllm.models.tiles import tiled
from tests.models.conftest import Parts, picture

BOX: Box = (0.0, 0.25, 0.5, 0.5)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FEATURE = {"regions": "feature"}


def grounded(box: Box = BOX, answer: Box | None = None) -> Document:
    """A conversation that names a box, and perhaps answers with one."""
    said = "It is a dog." if answer is None else Text("", box=answer)
    return Document.conversation(
        [
            ("user", [picture(1, 40, 40), "What is at ", Text("", box=box), "?"]),
            ("assistant", [said]),
        ]
    )


def hidden_of(model: MultimodalModel, pack: Pack) -> Tensor:
    hidden: Tensor = model.hidden_states(
        pack.input_ids,
        pack.pixels,
        pack.sizes,
        pack.order,
        pack.bags,
        cu_seqlens=pack.cu_seqlens,
    )
    return hidden[0]


@pytest.mark.parametrize(
    ("style", "text"),
    [("decimals", "[0.000,0.250,0.500,0.500]"), ("thousandths", "[0, 250, 500, 500]")],
)
def test_a_box_is_written_as_numbers_and_learned(
    build: Callable[..., Parts], style: str, text: str
) -> None:
    _, processor = build(images={"regions": style})
    sample = processor.encode(grounded(answer=BOX))
    plain = processor.tokenizer.decode(sample.input_ids)
    assert f"What is at {text}?" in plain
    learned = processor.tokenizer.decode(sample.input_ids[sample.labels >= 0])
    assert learned == f"{text}<|im_end|>"
    assert len(sample.order) == len(sample.bags) == 0


def test_a_feature_is_the_mean_of_what_the_box_shows(build: Callable[..., Parts]) -> None:
    model, processor = build("siglip", "mlp", images=FEATURE)
    sample = processor.encode(grounded())
    pack = collate([sample], 0)
    places = np.flatnonzero(sample.input_ids == processor.image_token_id)
    assert len(places) == 16 + 1
    with torch.no_grad():
        tokens = model.image_features(pack.pixels, pack.sizes)
        embeds = model._fuse(
            pack.input_ids[None], Images(pack.pixels, pack.sizes, pack.order, pack.bags)
        ).embeds
    # 4 x 4 cells: the second row, its left half
    expected = tokens[[4, 5]].mean(dim=0)
    torch.testing.assert_close(embeds[0, places[-1]], expected)
    torch.testing.assert_close(embeds[0, places[:-1]], tokens)
    assert (sample.labels[places] == -100).all()
    cost = processor.cost(grounded())
    total = cost.overhead + sum(text for text, _ in cost.pieces) + processor.image_cost(40, 40)[0]
    assert total == len(sample.input_ids)


@pytest.mark.parametrize(
    "tiling",
    [
        {},
        {"tiling": "dynamic", "tiles": 4},
        {"tiling": "any_resolution"},
        {"tiling": "split", "longest_edge": 64},
    ],
    ids=["one view", "dynamic", "any_resolution", "split"],
)
def test_features_in_packs_beams_and_saved_folders(
    build: Callable[..., Parts], tiling: dict[str, Any], tmp_path: Path
) -> None:
    model, processor = build("siglip", "mlp", images={**tiling, **FEATURE})
    samples = [
        processor.encode(document)
        for document in (
            grounded(),
            Document.caption(picture(3), "a red chair"),
            grounded((0.6, 0.1, 0.9, 0.2)),
            Document.conversation([("user", "Which room?"), ("assistant", "the red room")]),
        )
    ]
    for chosen in (samples, samples[::-1]):
        with torch.no_grad():
            packed = hidden_of(model, collate(chosen, 0))
            alone = torch.cat([hidden_of(model, collate([one], 0)) for one in chosen])
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load(tmp_path)
    asked = [
        Document.conversation([("user", [picture(1), "What is at ", Text("", box=BOX)])]),
        Document.conversation([("user", [picture(2, 80, 30), "What is this?"])]),
    ]
    beams: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    model.generation_config.eos_token_id = again.generation_config.eos_token_id = None
    together = model.generate(**processor.prompts(asked), **beams)
    for row, document in zip(together, asked, strict=True):
        one = again.generate(**same.prompt(document), **beams)[0]
        assert row[-4:].tolist() == one[-4:].tolist()


def test_the_box_decides_the_feature(build: Callable[..., Parts]) -> None:
    model, processor = build("siglip", "mlp", images=FEATURE)
    outputs = []
    for box in (BOX, (0.5, 0.5, 1.0, 1.0)):
        pack = collate([processor.encode(grounded(box))], 0)
        with torch.no_grad():
            outputs.append(hidden_of(model, pack))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("resize", "short_edge"), [("squash", 0), ("crop", 0), ("crop", 44), ("pad", 0)]
)
@pytest.mark.parametrize("size", [(40, 80), (80, 40), (64, 64)])
def test_boxes_follow_what_the_encoder_is_shown(
    resize: str, short_edge: int, size: tuple[int, int]
) -> None:
    half = (0.5, 0.5, 0.5)
    geometry = ImageGeometry(32, 8, half, half, resize, "nearest", short_edge)
    height, width = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    box: Box = (0.4, 0.3, 0.7, 0.8)
    pixels[int(0.3 * height) : int(0.8 * height), int(0.4 * width) : int(0.7 * width)] = 255
    for tiling in ({}, {"tiling": "dynamic", "tiles": 4}, {"tiling": "any_resolution"}):
        cutting = tiled(geometry, tiling)
        views = np.stack(cutting.views(pixels))[..., 0]
        cells = views.reshape(len(views), 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1)
        found = np.zeros(len(cells), dtype=bool)
        found[inside(box, height, width, cutting, lambda grid: grid)] = True
        clear = (cells < 20) | (cells > 235)  # cells on the border show both
        assert ((cells > 127) == found)[clear].all()
        assert found.sum() > 3


def test_a_box_too_small_for_a_middle_takes_the_nearest() -> None:
    geometry = ImageGeometry(32, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    found = inside((0.99, 0.99, 1.0, 1.0), 50, 50, geometry, lambda grid: grid)
    assert found.tolist() == [15]


@pytest.mark.parametrize(
    ("box", "tokens"),
    [
        ((0.25, 0.25, 0.75, 0.75), [5, 6, 9, 10]),  # edges between cells
        ((0.125, 0.125, 0.375, 0.375), [0]),  # edges on middles: neighbouring boxes share no token
        ((0.375, 0.375, 0.875, 0.875), [5, 6, 9, 10]),
    ],
)
def test_an_edge_on_a_middle_belongs_to_one_box(box: Box, tokens: list[int]) -> None:
    geometry = ImageGeometry(32, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert inside(box, 50, 50, geometry, lambda grid: grid).tolist() == tokens


def test_what_cannot_be_a_region_is_refused(build: Callable[..., Parts]) -> None:
    with pytest.raises(ValueError, match="feature needs visual tokens that have places"):
        build(connector="resampler", images=FEATURE)
    with pytest.raises(ValueError, match="got 'features'; did you mean 'feature'"):
        build(images={"regions": "features"})
    with pytest.raises(DocumentError, match="left, top, right, bottom as fractions"):
        Text("", box=(0.5, 0.1, 0.2, 0.9))
    with pytest.raises(DocumentError, match="a box stands before the first image"):
        Document((Text("", box=BOX), picture(1)))


def test_a_box_stays_with_its_image() -> None:
    page = Document(
        (
            *(picture(1), Text("a cat")),
            *(Text("and at"), Text("", box=BOX), Text("a dog.")),
            *(picture(2), Text("a parrot")),
        )
    )
    assert page.pieces() == [(0, 4), (4, 5), (5, 7)]


# -- clips ---------------------------------------------------------------------------------------


def clip(frames: int, number: int = 1) -> list[Any]:
    return [replace(picture(place, 30, 40), clip=number) for place in range(frames)]


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(1, [4]), (16, [4]), (32, [2, 6]), (50, [1, 4, 6]), (127, [0, 1, 2, 4, 5, 6, 7]), (999, None)],
)
def test_a_clip_takes_what_its_budget_says(
    build: Callable[..., Parts], budget: int, kept: list[int] | None
) -> None:
    _, processor = build("clip", "mlp", images={"clip_tokens": budget})
    document = Document.conversation(
        [
            ("user", [picture(99), "before", *clip(8), "What happens?"]),
            ("assistant", "It is a dog."),
        ]
    )
    kept = [*range(8)] if kept is None else kept
    sample = processor.encode(document)
    assert [slot.image for slot in sample.slots] == [0, *(1 + place for place in kept)]
    cost = processor.cost(document)
    images = [image for _, numbers in cost.pieces for image in numbers]
    assert images == [0, *(1 + place for place in kept)]
    tokens = cost.overhead + sum(text for text, _ in cost.pieces) + 16 * len(images)
    assert tokens == len(sample.input_ids)
    again = processor.prompt(replace(document, parts=document.parts[:-1]))
    assert len(again["sizes"]) == len(images)


def test_each_clip_has_its_own_budget_and_slices_agree(build: Callable[..., Parts]) -> None:
    _, processor = build("clip", "mlp", images={"clip_tokens": 32})
    page = Document((*clip(4), *clip(3, 2), Text("a"), *clip(6, 3), Text("b"), picture(9)))
    sample = processor.encode(page)
    assert [slot.image for slot in sample.slots] == [1, 3, 4, 6, 8, 11, 13]
    cost = processor.cost(page)
    for start in range(len(cost.pieces)):
        for stop in range(start + 1, len(cost.pieces) + 1):
            part = processor.encode(page.select(start, stop))
            chosen = cost.pieces[start:stop]
            tokens = sum(text + 16 * len(images) for text, images in chosen)
            assert len(part.input_ids) == cost.overhead + tokens


@pytest.mark.parametrize("tokens", [256, 64])
def test_a_thinned_clip_is_planned_and_loaded_and_learned(
    build: Callable[..., Parts], tmp_path: Path, tokens: int
) -> None:
    """Frames that are left out are never decoded; a pack of 64 holds one clip, not both."""
    model, processor = build("clip", "mlp", images={"clip_tokens": 32})
    frames = [*clip(6), *clip(3, 2)]
    for place in (0, 2, 3, 5, 7):
        frames[place] = replace(frames[place], data=b"cut")
    page = Document((*frames[:6], Text("a red chair"), *frames[6:], Text("a cat")), key="page")
    talk = Document.conversation([("user", [*frames, "What?"]), ("assistant", "A dog.")], key="t")
    index = build_index(
        write_shards([page, talk], tmp_path, "clips").paths,
        processor.cost,
        processor.text_fingerprint,
    )
    assert not index.refused
    plan = Plan(
        [index],
        [1.0],
        processor_fingerprint=processor.fingerprint,
        image_cost=processor.image_cost,
        tokens=tokens,
        patches=1000,
        tokens_per_step=tokens,
        seed=0,
        epochs=1,
    )
    loader = Loader(plan, processor.encode, rank=0, world=1, workers=0)
    steps = list(loader)
    for step, packs in steps:
        for planned, pack in zip(step.packs, packs, strict=True):
            assert not pack.refused
            assert pack.input_ids.numel() == planned.tokens
            assert len(pack.sizes) * 16 == planned.patches
            assert torch.isfinite(hidden_of(model, pack)).all()
    shown = sum(len(pack.sizes) for _, packs in steps for pack in packs)
    assert shown == (8 if tokens == 256 else 4)


def test_another_budget_is_another_count(build: Callable[..., Parts]) -> None:
    prints = set()
    for images in ({}, {"clip_tokens": 32}, {"clip_tokens": 64}, {"regions": "thousandths"}):
        _, processor = build("clip", "mlp", images=images)
        prints.add(processor.text_fingerprint)
    assert len(prints) == 4
    with pytest.raises(ValueError, match="clip_tokens must be a whole number"):
        build(images={"clip_tokens": 0})


def messages(box: Any) -> list[dict[str, Any]]:
    """What `grounded` says, as transformers' users write it."""
    region = {"type": "text", "text": "", "box": box}
    before, after = ({"type": "text", "text": text} for text in ("What is at ", "?"))
    image = {"type": "image", "image": picture(1, 40, 40).data}
    return [{"role": "user", "content": [image, before, region, after]}]


@pytest.mark.parametrize("style", STYLES)
def test_a_message_has_boxes_as_a_document_has(build: Callable[..., Parts], style: str) -> None:
    _, processor = build("siglip", "mlp", images={"regions": style})
    theirs = processor.apply_chat_template(
        messages([*BOX]), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    asked = Document.conversation([("user", [picture(1, 40, 40), *grounded().parts[1:4]])])
    ours = processor.prompt(asked)
    assert theirs.keys() >= ours.keys()
    for name, values in ours.items():
        torch.testing.assert_close(theirs[name], values)
    text = processor.apply_chat_template(messages([*BOX]))
    assert f"What is at {spelled(BOX, style)}?" in text


def test_a_message_with_a_box_that_is_none(build: Callable[..., Parts]) -> None:
    _, processor = build("siglip", "mlp", images=FEATURE)
    for box in ([0.5, 0.1], "left", [0.5, 0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match="a box is left, top, right, bottom as fractions"):
            processor.apply_chat_template(messages(box), tokenize=True)
    with pytest.raises(ValueError, match="the text holds 1 regions, but 0 boxes are given"):
        processor(text="What is at <region>?")
