"""Positions in three directions: those of transformers, in packs, in batches, while generating."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from data_packing.document import Document
from data_packing.pack import collate
from mllm.models.modeling import MultimodalModel
from mllm.models.positions import is_spatial, named, placed, spatial_positions
from mllm.models.processor import Processor
from tests.models.conftest import documents, llama_config, picture
from tests.models.families import FAMILIES, save_family
from tests.models.native_folders import VISION

IMAGE = 7
Grid = tuple[int, int]
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
PIECES = st.lists(st.one_of(st.integers(1, 5), GRIDS), min_size=1, max_size=6)
"""A document: so many tokens of text, or a view of so many rows and columns of tokens."""

OURS: dict[str, Any] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLModel),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLModel),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLModel),
}


@cache
def theirs(name: str) -> Any:
    config, kind = OURS[name]
    text = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 9}
    with torch.device("meta"):
        return kind(config(text_config=text, vision_config=VISION[name]))


def separated(pieces: list[int | Grid]) -> list[int | Grid]:
    """The pieces with a token between neighbouring views, which transformers asks for."""
    parts: list[int | Grid] = []
    for piece in pieces:
        if parts and not isinstance(piece, int) and not isinstance(parts[-1], int):
            parts.append(1)
        parts.append(piece)
    return parts


def written(pieces: list[int | Grid]) -> tuple[Tensor, list[Grid]]:
    """Ids [T] and the grids of its views."""
    ids = [[1] * p if isinstance(p, int) else [IMAGE] * (p[0] * p[1]) for p in pieces]
    return torch.tensor([one for part in ids for one in part]), [
        piece for piece in pieces if not isinstance(piece, int)
    ]


def by_transformers(name: str, ids: Tensor, grids: list[Grid], mask: Tensor | None = None) -> Any:
    shapes = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids]).view(-1, 3)
    kinds = (ids == IMAGE).int()
    return theirs(name).get_rope_index(ids, kinds, shapes, attention_mask=mask)[0]


@pytest.mark.parametrize("name", OURS)
@given(pieces=PIECES)
@settings(max_examples=60, deadline=None)
def test_a_document_has_the_positions_of_transformers(name: str, pieces: list[int | Grid]) -> None:
    ids, grids = written(separated(pieces))
    found = placed(ids[None] == IMAGE, grids)
    assert torch.equal(found, by_transformers(name, ids[None], grids))


@given(st.lists(PIECES, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_they_restart_with_every_document_of_a_pack(pack: list[list[int | Grid]]) -> None:
    alone = [written(pieces) for pieces in pack]
    bounds = (0, *itertools.accumulate(len(ids) for ids, _ in alone))
    plain = torch.cat([torch.arange(len(ids)) for ids, _ in alone])
    ids = torch.cat([ids for ids, _ in alone])[None]
    grids = [grid for _, grids in alone for grid in grids]
    found = placed(ids == IMAGE, grids, positions=plain[None], bounds=bounds)
    wanted = [placed(ids[None] == IMAGE, grids) for ids, grids in alone]
    assert torch.equal(found, torch.cat(wanted, dim=2))


@given(st.lists(PIECES, min_size=2, max_size=3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_of_a_batch_begin_at_their_first_token(
    rows: list[list[int | Grid]], left: bool
) -> None:
    texts = [written(separated(pieces)) for pieces in rows]
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (one, _) in enumerate(texts):
        place = slice(longest - len(one), None) if left else slice(len(one))
        ids[row, place], mask[row, place] = one, 1
    grids = [grid for _, grids in texts for grid in grids]
    found = placed(ids == IMAGE, grids, mask=mask)
    wanted = by_transformers("qwen2_5_vl", ids, grids, mask)
    assert torch.equal(found * mask, wanted * mask)


def test_branches_that_share_a_beginning_go_on_after_it() -> None:
    start, grids = written([2, (3, 2), 1])
    for branch in (2, 4):
        whole = torch.cat([start, torch.ones(branch, dtype=torch.int64)])[None]
        alone = placed(whole == IMAGE, grids)
        row = torch.cat([start, torch.ones(6, dtype=torch.int64)])[None]
        plain = torch.cat([torch.arange(9), 9 + torch.arange(2), 9 + torch.arange(4)])[None]
        found = spatial_positions(plain, row == IMAGE, grids)
        at = 9 if branch == 2 else 11
        assert torch.equal(found[..., at : at + branch], alone[..., 9:])


def test_views_that_do_not_stand_whole_are_text() -> None:
    """Views of 2 x 2, 1 x 3 and 2 x 1: the first as made, then a mean, then the last and a part."""
    order, bags = torch.tensor([0, 1, 2, 3, 0, 4, 5, 7, 8, 5]), torch.tensor([1] * 4 + [3, 1, 1, 1])
    tokens = named(order, bags)
    assert tokens == [0, 1, 2, 3, -1, 7, 8, 5]
    assert named(order, None) == order.tolist()
    assert named(torch.zeros(0), None) is None
    slots = torch.tensor([[False, *[True] * 4, False, *[True] * 4, False]])
    time, down, across = placed(slots, [(2, 2), (1, 3), (2, 1)], tokens)
    assert time.tolist() == [[0, 1, 1, 1, 1, 3, 4, 5, 5, 7, 8]]
    assert (down - time).tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0]]
    assert (across - time).tolist() == [[0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]]


def test_which_language_models_have_them() -> None:
    spatial = {name for name, config in FAMILIES.items() if is_spatial(config)}
    assert spatial == {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    assert is_spatial(llama_config(rope_parameters=rope))


@pytest.fixture(params=["qwen2_vl_text", "qwen3_vl_text"])
def parts(
    request: pytest.FixtureRequest,
    build: Callable[..., Any],
    tmp_path: Path,
) -> tuple[MultimodalModel, Processor]:
    """Images of native resolution, so that views differ."""
    text = save_family(tmp_path / "text", FAMILIES[request.param])
    model, processor = build("qwen2_5_vl", "patch_merger", text)
    return model, processor


@torch.no_grad()
def test_a_call_without_positions_makes_them(parts: tuple[MultimodalModel, Processor]) -> None:
    model, processor = parts
    pack = collate([processor.encode(one) for one in documents()[:2]], 0)
    sight = (pack.input_ids, pack.pixels, pack.sizes)
    made = model.hidden_states(*sight, cu_seqlens=pack.cu_seqlens)
    given = model.hidden_states(*sight, cu_seqlens=pack.cu_seqlens, position_ids=pack.position_ids)
    assert torch.equal(made, given)
    flat = pack.position_ids.expand(3, 1, -1)
    plain = model.hidden_states(*sight, cu_seqlens=pack.cu_seqlens, position_ids=flat)
    assert (plain - made).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_goes_on_after_the_images(
    parts: tuple[MultimodalModel, Processor], beams: int
) -> None:
    """With the cache, in a left-padded batch: as reading the whole text anew at every step."""
    model, processor = parts
    model.generation_config.eos_token_id = None
    prompts = [
        Document.conversation([("user", [picture(1, 90, 20), "What?", picture(2, 24, 40)])]),
        Document.conversation([("user", ["Which room is this?", picture(3, 30, 100)])]),
        Document.conversation([("user", "a cat")]),
        Document((*Document.caption(picture(4, 50, 20), "a").parts[:1],)),
    ]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    inputs = processor.prompts(prompts)
    assert inputs["sizes"].shape[0] == 4
    found = model.generate(**inputs, **options)
    anew = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(found, anew)
    length = inputs["input_ids"].shape[1]
    for row, prompt in enumerate(prompts):
        one = processor.prompt(prompt)
        alone = model.generate(**one, **options)
        assert torch.equal(found[row, length:], alone[0, one["input_ids"].shape[1] :])


@torch.no_grad()
def test_what_is_generated_is_what_reading_it_gives(
    parts: tuple[MultimodalModel, Processor],
) -> None:
    """Logits while generating, in a left-padded batch, are those of the finished text."""
    model, processor = parts
    model.generation_config.eos_token_id = None
    prompts = [
        Document.conversation([("user", [picture(1, 90, 20), "What?", picture(2, 24, 40)])]),
        Document((*Document.caption(picture(4, 50, 20), "a").parts[:1],)),
    ]
    inputs = processor.prompts(prompts)
    steps = model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, prompt in enumerate(prompts):
        one = processor.prompt(prompt)
        length = one["input_ids"].shape[1]
        whole = steps.sequences[row, -length - 5 :][None]
        read = model(whole, one["pixels"], one["sizes"]).logits[0, length - 1 : -1]
        found = torch.stack([logits[row] for logits in steps.logits])
        torch.testing.assert_close(found, read, rtol=0, atol=1e-5)


def test_a_cache_and_plain_positions_are_refused(parts: tuple[MultimodalModel, Processor]) -> None:
    model, _ = parts
    ids = torch.tensor([[4, 5, 6]])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"with a cache give position_ids \[3, B, T\]"):
        model(ids, past_key_values=cache)
