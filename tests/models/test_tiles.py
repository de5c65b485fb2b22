"""Images cut into tiles: what they become, and that text and features agree about it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_packing.document import Document
from data_packing.pack import Pack, collate
from data_packing.sample import Sample
from mllm.models.assemble import assemble, load
from mllm.models.geometry import ImageGeometry
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.tiles import AnyResolution, DynamicTiles, SplitTiles
from tests.models.conftest import Parts, documents, picture

TILINGS: list[dict[str, Any]] = [
    {"tiling": "dynamic", "tiles": 6},
    {"tiling": "dynamic", "tiles": 4, "thumbnail": False},
    {"tiling": "any_resolution"},
    {"tiling": "any_resolution", "tiles": 4},
    {"tiling": "split", "longest_edge": 96},
]
NAMES = ["dynamic", "no thumbnail", "any_resolution", "grids by number", "split"]
SQUARE = ImageGeometry(32, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(params=TILINGS, ids=NAMES)
def parts(request: pytest.FixtureRequest, build: Callable[..., Parts]) -> Parts:
    return build("clip", "mlp", images=request.param)


def hidden_of(model: MultimodalModel, pack: Pack) -> Tensor:
    return model.hidden_states(
        pack.input_ids,
        pack.pixels,
        pack.sizes,
        pack.order,
        pack.bags,
        cu_seqlens=pack.cu_seqlens,
    )[0]


def pages(*sizes: tuple[int, int]) -> list[Document]:
    shown = [picture(number, height, width) for number, (height, width) in enumerate(sizes)]
    return [
        Document.conversation(
            [("user", [*shown, "What is this?"]), ("assistant", "It is a dog.")], "s", "chat"
        ),
        *(Document.caption(image, "a red chair", "s", str(n)) for n, image in enumerate(shown)),
    ]


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shown=st.lists(sizes, min_size=1, max_size=3))
def test_text_and_features_agree_for_any_size(parts: Parts, shown: list[tuple[int, int]]) -> None:
    model, processor = parts
    for document in pages(*shown):
        sample = processor.encode(document)
        images = document.images
        costs = [processor.image_cost(image.height, image.width) for image in images]
        assert [slot.length for slot in sample.slots] == [tokens for tokens, _ in costs]
        text = processor.cost(document)
        total = text.overhead + sum(tokens for tokens, _ in text.pieces)
        assert len(sample.input_ids) == total + sum(tokens for tokens, _ in costs)
        heights = [sum(processor.layout(i.height, i.width).sizes, ()) for i in images]
        assert [side for view in sample.pixels for side in view.shape[:2]] == [*sum(heights, ())]
        assert sum(prod(view.shape) for view in sample.pixels) == sum(
            processor.image_bytes(image.height, image.width) for image in images
        )
        cells = sum(prod(model.encoder.grid(*view.shape[:2])) for view in sample.pixels)
        assert cells == sum(patches for _, patches in costs)
        pack = collate([sample], 0)
        wanted = int((pack.input_ids == processor.image_token_id).sum())
        made = sum(model.tokens_per_view(pack.sizes))
        assert made == sum(slot.made for slot in sample.slots)
        if len(pack.order):
            assert len(pack.order) == wanted
            assert int(pack.order.max()) < made
        else:
            assert wanted == made
        labels = sample.labels[sample.labels >= 0]
        assert processor.image_token_id not in labels
        for slot in sample.slots:
            assert (sample.labels[slot.start : slot.start + slot.length] == -100).all()
        with torch.no_grad():
            hidden_of(model, pack)


def test_packed_equals_unpacked(parts: Parts) -> None:
    model, processor = parts
    chosen = [*documents(), *pages((90, 40), (31, 200))]
    samples = [processor.encode(document) for document in chosen]
    with torch.no_grad():
        packed = hidden_of(model, collate(samples, 0))
        alone = torch.cat([hidden_of(model, collate([sample], 0)) for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    # text first and an image second: the order of one document begins where another's ends
    samples.reverse()
    with torch.no_grad():
        packed = hidden_of(model, collate(samples, 0))
        alone = torch.cat([hidden_of(model, collate([sample], 0)) for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_what_a_folder_saves_is_loaded_and_generates_alike(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load(tmp_path)
    assert same.fingerprint == processor.fingerprint
    chat = Document.conversation([("user", [picture(1, 90, 40), picture(2), "What is this?"])])
    caption = Document((picture(3, 20, 100),))
    for beams in (1, 3):
        how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        rows = model.generate(**processor.prompts([chat, caption]), **how)
        torch.testing.assert_close(again.generate(**same.prompts([chat, caption]), **how), rows)
        for row, document in zip(rows, (chat, caption), strict=True):
            prompt = processor.prompt(document)
            alone = model.generate(**prompt, **how)[0]
            new = alone[prompt["input_ids"].shape[1] :]
            assert row.tolist()[-len(new) :] == new.tolist() or _ends_alike(row, new)


def _ends_alike(row: Tensor, new: Tensor) -> bool:
    """Rows that end early are filled up."""
    text = row.tolist()[-6:]
    return text[: len(new)] == new.tolist()


@pytest.mark.parametrize(
    ("size", "tiles", "grid"),
    [
        ((100, 100), 12, (1, 1)),
        ((64, 64), 12, (2, 2)),
        ((32, 64), 12, (1, 2)),
        ((400, 100), 12, (4, 1)),
        ((1, 1000), 12, (1, 12)),
        ((200, 300), 6, (2, 3)),
        ((200, 300), 1, (1, 1)),
    ],
)
def test_dynamic_takes_the_grid_of_the_nearest_aspect(
    size: tuple[int, int], tiles: int, grid: tuple[int, int]
) -> None:
    tiling = DynamicTiles(SQUARE, {"tiling": "dynamic", "tiles": tiles})
    if size == (100, 100):  # square grids of 1, 4 and 9 tiles: more pixels, more tiles
        assert tiling.tile_grid(10, 10) == (1, 1)
        assert tiling.tile_grid(*size) == (3, 3)
    else:
        assert tiling.tile_grid(*size) == grid
    views = tiling.views(np.zeros((*size, 3), dtype=np.uint8))
    assert len(views) == tiling.count(*size) == len(tiling.view_sizes(*size))


def test_tiles_show_their_places() -> None:
    image = np.zeros((64, 96, 3), dtype=np.uint8)
    for row in range(2):
        for column in range(3):
            image[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = 40 * row + 10 * column
    flat = [0, 10, 20, 40, 50, 60]
    dynamic = DynamicTiles(SQUARE, {"tiling": "dynamic", "tiles": 6}).views(image)
    assert [int(np.median(view)) for view in dynamic[:-1]] == flat
    grids = {"tiling": "any_resolution", "grids": [[2, 3]]}
    any_resolution = AnyResolution(SQUARE, grids).views(image)
    assert [int(np.median(view)) for view in any_resolution[1:]] == flat
    split = SplitTiles(SQUARE, {"tiling": "split", "longest_edge": 96}).views(image)
    assert [int(np.median(view)) for view in split[:-1]] == flat
    for whole in (dynamic[-1], any_resolution[0], split[-1]):
        assert whole.shape == (32, 32, 3)
        assert whole[-1, -1, 0] > whole[0, 0, 0]


def test_any_resolution_puts_tiles_together_without_padding() -> None:
    tiling = AnyResolution(SQUARE, {"tiling": "any_resolution", "grids": [[2, 2]]})
    layout = tiling.layout(64, 32, lambda grid: (2, 2))  # half of the columns are padding
    assert layout.order is not None
    whole, rest = layout.order[:4].tolist(), layout.order[4:].reshape(4, -1).tolist()
    assert whole == [0, 1, 2, 3]
    # tiles 0..3 hold 4 tokens each, after the four of the whole; a map of 4 x 4
    assert rest == [[5, 8, -1], [7, 10, -1], [13, 16, -1], [15, 18, -1]]
    assert layout.made == 20
    assert layout.tokens == len(layout.order) == 16


def test_split_writes_marks(build: Callable[..., Parts]) -> None:
    _, processor = build(connector="mlp", images={"tiling": "split", "longest_edge": 64})
    sample = processor.encode(Document.caption(picture(1, 60, 60), "a cat"))
    text = processor.tokenizer.decode(sample.input_ids).replace("<image>" * 16, "*")
    around = "<fake_token_around_image>"
    lines = [f"{around}<row_{r}_col_1>*{around}<row_{r}_col_2>*\n" for r in (1, 2)]
    assert "".join(lines) + f"\n{around}<global-img>*{around}a cat" in text
    assert len(sample.pixels) == 5
    small = processor.layout(7, 7)
    assert small.tokens == 5 * 16  # the long edge is scaled up first


def test_a_stage_may_cut_images_that_the_one_before_did_not(
    build: Callable[..., Parts], tmp_path: Path
) -> None:
    model, processor = build("clip", "mlp")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for images in TILINGS:
        again, cutting = assemble({"from": tmp_path, "images": images})
        sample = cutting.encode(pages((90, 40))[0])
        assert len(sample.pixels) > 1
        with torch.no_grad():
            assert hidden_of(again, collate([sample], 0)).isfinite().all()
        _saved_again(again, cutting, tmp_path / cutting.fingerprint)
    with pytest.raises(ValueError, match="unknown option of images .give images.tiling"):
        assemble({"from": tmp_path, "images": {"tiles": 3}})


def _saved_again(model: MultimodalModel, processor: Processor, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    fewer = {"tiling": "none"}
    plain, undone = assemble({"from": folder, "images": fewer})
    sample: Sample = undone.encode(pages((90, 40))[0])
    assert len(sample.pixels) == 1
    assert not hasattr(plain.connector, "newline")
    kept, _ = load(folder)
    assert hasattr(kept.connector, "newline") == hasattr(model.connector, "newline")
    if hasattr(model.connector, "newline"):
        assert torch.equal(kept.connector.newline.weight, model.connector.newline.weight)


def test_the_newline_is_trained(build: Callable[..., Parts]) -> None:
    model, processor = build("clip", "mlp", images={"tiling": "any_resolution"})
    model.train()
    pack = collate([processor.encode(document) for document in documents()], 0)
    hidden_of(model, pack).square().sum().backward()
    gradient = model.connector.newline.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    # a rank without an image calls it all the same, with no gradient but zeros
    model.zero_grad()
    text = collate([processor.encode(documents()[-1])], 0)
    hidden_of(model, text).square().sum().backward()
    assert model.connector.newline.weight.grad is not None
    assert not model.connector.newline.weight.grad.any()


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ({"tiling": "dynamc"}, "unknown tiling 'dynamc'; did you mean 'dynamic'?"),
        ({"tiling": "dynamic", "tile": 3}, "unknown option of the tiling dynamic 'tile'"),
        ({"tiling": "dynamic", "tiles": 0}, "tiles must be a whole number greater than 0, got 0"),
        ({"tiling": "dynamic", "tiles": 2, "min_tiles": 3}, "min_tiles 3 is more than tiles 2"),
        ({"tiling": "dynamic", "thumbnail": 1}, "thumbnail must be true or false, got 1"),
        (
            {"tiling": "any_resolution", "grids": [[0, 1]]},
            "[[rows, columns], …], got [[0, 1]]",
        ),
        ({"tiling": "any_resolution", "grids": [[1, 1]], "tiles": 2}, "grids or tiles, not both"),
        ({"tiling": "split", "longest_edge": 500}, "longest_edge 500 is not between one tile"),
    ],
)
def test_wrong_options_are_refused(
    build: Callable[..., Parts], images: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError) as error:
        build(images=images)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_tokens_without_places_make_no_map(build: Callable[..., Parts]) -> None:
    with pytest.raises(ValueError, match="makes a row of 5 tokens without places; use .* dynamic"):
        build(connector="resampler", images={"tiling": "any_resolution"})
