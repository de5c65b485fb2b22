"""Gated cross-attention to images that are cut into tiles: every tile belongs to its image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_packing.document import Document, Text
from data_packing.pack import Pack, collate
from mllm.models.assemble import assemble, load
from mllm.models.modeling import MultimodalModel
from tests.models.conftest import Parts, chat, documents, open_gates, picture
from tests.models.fused import CROSS, logits, packed, text_logits
from tests.models.test_packed_equals_unpacked import (
    assert_packed_is_unpacked,
    gradients,
    logits_of,
    loss_of,
)

ALL = {**CROSS, "only_immediate": False}
TILINGS: dict[str, dict[str, Any]] = {
    "dynamic": {"tiling": "dynamic", "tiles": 6},
    "any_resolution": {"tiling": "any_resolution"},
    "split": {"tiling": "split", "longest_edge": 64},
}


def shown() -> list[Document]:
    """One of each kind, and images of one tile and of several in one document."""
    page = Document(
        (
            *Document.caption(picture(5, 20, 150), "a red chair").parts,
            *Document.caption(picture(6, 30, 30), "a small green parrot").parts,
        ),
        "pages",
        "2",
    )
    return [*documents(), page, Document.caption(picture(7, 90, 40), "a cat")]


@pytest.fixture(params=TILINGS)
def cut(request: pytest.FixtureRequest, build: Callable[..., Parts]) -> Parts:
    """A model that cuts images, its gates open."""
    model, processor = build(fusion=CROSS, images=TILINGS[request.param])
    return open_gates(model), processor


# -- what an image is ------------------------------------------------------------------------------


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), max_size=3))
def test_one_token_and_all_its_views_for_any_size(cut: Parts, sizes: list[tuple[int, int]]) -> None:
    model, processor = cut
    images = [picture(number, *size) for number, size in enumerate(sizes)]
    text = [Text("a cat"), Text(" a red chair"), Text(" the parrot")]
    parts = [part for pair in zip(images, text, strict=False) for part in pair]
    document = Document((*parts, Text(" it is")))
    sample = processor.encode(document)
    pack = collate([sample], 0)
    layouts = [processor.layout(*size) for size in sizes]
    assert int((pack.input_ids == processor.image_token_id).sum()) == len(sizes)
    assert [slot.length for slot in sample.slots] == [1] * len(sizes)
    assert [processor.image_cost(*size) for size in sizes] == [(1, one.patches) for one in layouts]
    cost = processor.cost(document)
    assert len(pack.input_ids) == cost.overhead + sum(n for n, _ in cost.pieces) + len(sizes)
    assert pack.bags.tolist() == [layout.visual for layout in layouts]
    made = [sum(model.tokens_per_view(torch.tensor(layout.sizes))) for layout in layouts]
    firsts = [sum(made[:number]) for number in range(len(made))]
    for named, first, count in zip(pack.order.split(pack.bags.tolist()), firsts, made, strict=True):
        assert len(set(named.tolist())) == len(named)
        assert first == int(named.min())
        assert int(named.max()) < first + count
    with torch.no_grad():
        assert logits(model, pack).isfinite().all()


@pytest.mark.parametrize(
    ("images", "size", "views", "visual"),
    [
        (TILINGS["dynamic"], (64, 96), 7, 7 * 16),
        ({"tiling": "any_resolution", "grids": [[2, 2]]}, (64, 32), 5, 16 + 32),
        (TILINGS["split"], (64, 64), 5, 5 * 16),
    ],
    ids=TILINGS,
)
def test_padding_newlines_and_marks_are_left_out(
    build: Callable[..., Parts], images: Any, size: Any, views: int, visual: int
) -> None:
    """A view has 16 visual tokens; half of a map of 2 x 2 tiles is padding of a narrow image."""
    model, processor = build(fusion=CROSS, images=images)
    layout = processor.layout(*size)
    assert (len(layout.sizes), layout.visual) == (views, visual)
    assert (layout.tokens, layout.marks) == (1, ())
    plain, other = build(fusion=CROSS)
    assert len(processor.tokenizer) == len(other.tokenizer)
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_every_tile_is_seen_by_its_image_and_what_follows(cut: Parts) -> None:
    model, processor = cut
    page = shown()[-2]
    sample = processor.encode(page)
    first = sample.slots[0].views
    assert first > 1
    second = (sample.input_ids == processor.image_token_id).nonzero()[0][1]
    with torch.no_grad():
        before = logits(model, collate([sample], 0))
        for number in range(len(sample.pixels)):
            pixels = [255 - v if n == number else v for n, v in enumerate(sample.pixels)]
            changed = logits(model, collate([replace(sample, pixels=pixels)], 0)) != before
            place = sample.slots[0].start if number < first else second
            assert not changed[:place].any()
            assert changed[place].any()


def test_keys_have_no_order(cut: Parts) -> None:
    model, processor = cut
    pack = packed(processor, shown())
    named = [part.flip(0) for part in pack.order.split(pack.bags.tolist())]
    with torch.no_grad():
        turned = logits(model, replace(pack, order=torch.cat(named)))
        torch.testing.assert_close(turned, logits(model, pack), rtol=0, atol=1e-5)


# -- the text model, packs, ranks ------------------------------------------------------------------


@pytest.mark.parametrize("images", TILINGS.values(), ids=TILINGS)
def test_before_the_first_step_the_logits_are_the_text_models_bit_for_bit(
    build: Callable[..., Parts], images: dict[str, Any]
) -> None:
    model, processor = build(fusion=CROSS, images=images)
    pack = packed(processor, shown())
    with torch.no_grad():
        assert torch.equal(logits(model, pack), text_logits(model, pack))
        open_gates(model)
        assert (logits(model, pack) - text_logits(model, pack)).abs().max() > 1e-3


@pytest.mark.parametrize("spec", [CROSS, ALL], ids=["last", "all"])
@pytest.mark.parametrize("images", TILINGS.values(), ids=TILINGS)
def test_packed_equals_unpacked(
    build: Callable[..., Parts], images: dict[str, Any], spec: dict[str, Any]
) -> None:
    model, processor = build(fusion=spec, images=images)
    open_gates(model).train()
    assert_packed_is_unpacked(model, processor, shown())
    assert_packed_is_unpacked(model, processor, shown()[::-1])


@pytest.mark.parametrize("connector", ["resampler", "q_former", "pixel_shuffle"])
def test_other_connectors(build: Callable[..., Parts], connector: str) -> None:
    model, processor = build("clip", connector, fusion=CROSS, images=TILINGS["dynamic"])
    open_gates(model).train()
    assert_packed_is_unpacked(model, processor, shown())


@pytest.mark.parametrize("encoder", ["qwen2_vl", "siglip2_naflex"])
@pytest.mark.parametrize("spec", [CROSS, ALL], ids=["last", "all"])
def test_images_of_native_resolution(
    build: Callable[..., Parts], encoder: str, spec: dict[str, Any]
) -> None:
    """One view of its own size for every image; images make different numbers of tokens."""
    connector = "patch_merger" if encoder == "qwen2_vl" else "mlp"
    model, processor = build(encoder, connector, fusion=spec)
    open_gates(model).train()
    pack = packed(processor, shown())
    assert len(set(pack.bags.tolist())) > 1
    assert len(pack.bags) == len(pack.sizes)
    assert_packed_is_unpacked(model, processor, shown())


def test_another_document_changes_nothing(cut: Parts) -> None:
    model, processor = cut
    chosen = shown()
    other = Document((picture(70, 20, 150), *chosen[4].parts[1:]))
    before, after = (packed(processor, [*chosen[:4], one, chosen[5]]) for one in (chosen[4], other))
    assert torch.equal(before.input_ids, after.input_ids)
    with torch.no_grad():
        first, second = logits(model, before), logits(model, after)
    low, high = before.cu_seqlens[4:6].tolist()
    assert (first[low:high] - second[low:high]).abs().max() > 1e-3
    assert torch.equal(first[:low], second[:low])
    assert torch.equal(first[high:], second[high:])


def test_a_rank_without_an_image_runs_every_weight(cut: Parts) -> None:
    """So that no rank waits for it where weights are sharded; the gradients are zero."""
    model, processor = cut
    model.train()
    names = dict(model.named_parameters()).keys()
    for chosen, some in ((shown(), True), (documents()[-1:], False)):
        pack = packed(processor, chosen)
        loss_of(logits_of(model, pack), pack.labels).backward()
        found = gradients(model)
        assert found.keys() == names
        for part in ("encoder", "connector", "fusion"):
            assert any(bool(g.any()) for n, g in found.items() if n.startswith(part)) == some


# -- generating, folders ---------------------------------------------------------------------------


def asked() -> list[Document]:
    """Rows of two images, one and none."""
    page = Document((picture(1, 90, 40), Text("a cat"), picture(2), Text(" the")))
    return [page, Document((picture(3, 20, 100), Text("a red"))), Document((Text("the cat sat"),))]


@pytest.mark.parametrize("spec", [CROSS, ALL], ids=["last", "all"])
@pytest.mark.parametrize("images", TILINGS.values(), ids=TILINGS)
def test_a_cache_keeps_what_its_rows_see(
    build: Callable[..., Parts], images: dict[str, Any], spec: dict[str, Any]
) -> None:
    model, processor = build(fusion=spec, images=images)
    open_gates(model)
    inputs = processor.prompts(asked())
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    new = torch.tensor([[5, 8], [6, 9], [7, 10]])
    with torch.no_grad():
        cache = model(**inputs, position_ids=positions, use_cache=True).past_key_values
        got = model(
            new,
            attention_mask=torch.cat([mask, torch.ones_like(new)], dim=1),
            position_ids=positions[:, -1:] + torch.tensor([[1, 2]]),
            past_key_values=cache,
        ).logits
        for row, (document, ids) in enumerate(zip(asked(), new, strict=True)):
            alone = processor.prompt(document)
            alone["input_ids"] = torch.cat([alone["input_ids"], ids[None]], dim=1)
            del alone["attention_mask"]
            whole = model(**alone).logits[0, -2:]
            torch.testing.assert_close(got[row], whole, rtol=0, atol=1e-5)


def test_what_a_folder_saves_is_loaded_and_generates_alike(cut: Parts, tmp_path: Path) -> None:
    model, processor = cut
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load(tmp_path)
    assert same.fingerprint == processor.fingerprint
    for beams in (1, 3):
        how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        inputs = processor.prompts(asked())
        rows = model.generate(**inputs, **how)
        assert torch.equal(again.generate(**same.prompts(asked()), **how), rows)
        for row, document in zip(rows, asked(), strict=True):
            alone = model.generate(**processor.prompt(document), **how)
            assert row[-6:].tolist() == alone[0, -6:].tolist()


def test_a_stage_may_cut_images_that_the_one_before_did_not(
    build: Callable[..., Parts], tmp_path: Path
) -> None:
    model, processor = build(fusion=CROSS)
    open_gates(model).save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    expected = logits(model, packed(processor, shown()))
    for name, images in TILINGS.items():
        again, cutting = assemble({"from": tmp_path / "whole", "images": images})
        assert len(cutting.tokenizer) == len(processor.tokenizer)
        pack = packed(cutting, shown())
        assert torch.equal(pack.input_ids, packed(processor, shown()).input_ids)
        with torch.no_grad():
            assert (logits(again, pack) - expected).abs().max() > 1e-3
        again.save_pretrained(tmp_path / name)
        cutting.save_pretrained(tmp_path / name)
        back, undone = assemble({"from": tmp_path / name, "images": {"tiling": "none"}})
        with torch.no_grad():
            assert torch.equal(logits(back, packed(undone, shown())), expected)


def test_frames_of_a_clip_are_cut_as_images_are(build: Callable[..., Parts]) -> None:
    """A frame takes one token of a clip's budget; the last token sees every frame that is left."""
    images = {**TILINGS["dynamic"], "clip_tokens": 3}
    model, processor = build(fusion=ALL, images=images)
    open_gates(model)
    frames = [replace(picture(number, 64, 96), clip=1) for number in range(6)]
    sample = processor.encode(Document((*frames, Text("a cat"))))
    assert [slot.image for slot in sample.slots] == [1, 3, 5]
    assert len(sample.pixels) == 3 * 7
    with torch.no_grad():
        before = logits(model, collate([sample], 0))[-1]
        for number in range(0, 21, 7):
            pixels = [255 - v if n == number else v for n, v in enumerate(sample.pixels)]
            assert (logits(model, collate([replace(sample, pixels=pixels)], 0))[-1] != before).any()


# -- what is refused -------------------------------------------------------------------------------


def test_regions_have_no_token(build: Callable[..., Parts], tmp_path: Path) -> None:
    model, processor = build(fusion=CROSS, images={"regions": "decimals", "clip_tokens": 4})
    line = "fusion cross_attention has one token for an image and none for a region of it"
    with pytest.raises(ValueError, match=line) as refused:
        build(fusion=CROSS, images={"regions": "feature"})
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=line):
        processor.cutting({**TILINGS["dynamic"], "regions": "feature"})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=line):
        load(tmp_path, images={"regions": "feature"})


def test_images_that_do_not_agree_are_counted(cut: Parts) -> None:
    model, processor = cut
    pack = packed(processor, [chat(1), chat(2)])
    with pytest.raises(ValueError, match=r"2 image tokens, but there are \d+ images, and with"):
        model(pack.input_ids, pack.pixels, pack.sizes)
    with pytest.raises(ValueError, match="2 image tokens, but there are 1 images"):
        _without_last(model, pack)


def _without_last(model: MultimodalModel, pack: Pack) -> Tensor:
    (low, high), *_ = pairwise([0, *pack.bags.cumsum(0).tolist()])
    views = (pack.pixels, pack.sizes, pack.order[low:high], pack.bags[:1])
    return model.hidden_states(pack.input_ids, *views)
