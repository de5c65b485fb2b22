from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing_toys import IMAGE_PATCHES, IMAGE_TOKENS, image_cost, index_of, page

from data_packing.document import Document, Image
from data_packing.index import Index
from data_packing.slices import cut

pages = st.lists(
    st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(pages, st.integers(6, 60), st.integers(IMAGE_PATCHES - 1, 5 * IMAGE_PATCHES))
def test_every_piece_is_in_one_slice_or_named_and_nothing_is_too_large(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[list[int], bool]],
    tokens: int,
    patches: int,
) -> None:
    documents = [page(sizes, f"p{at}", images) for at, (sizes, images) in enumerate(shapes)]
    index = index_of(documents, tmp_path_factory.mktemp("shards"))
    units = cut(index, image_cost, tokens, patches)
    assert (units.tokens <= tokens).all()
    assert (units.patches <= patches).all()
    lost = dict(zip([item.key for item in units.split], units.pieces_refused, strict=True))
    gone = {item.key for item in units.refused}
    for number, document in enumerate(documents):
        mine = np.flatnonzero(units.document == number)
        covered = [
            piece for at in mine for piece in range(units.start_piece[at], units.stop_piece[at])
        ]
        assert covered == sorted(set(covered))
        pieces = len(document.pieces())
        assert (document.key in gone) == (not covered)
        if covered:
            assert len(covered) + lost.get(document.key, 0) == pieces
            assert (document.key in lost) == (len(mine) > 1 or len(covered) < pieces)
        for at in mine:
            start, stop = int(units.start_piece[at]), int(units.stop_piece[at])
            assert_promised_cost(document.select(start, stop), units.tokens[at], units.patches[at])


def assert_promised_cost(part: Document, tokens: int, patches: int) -> None:
    text = sum(len(p.text) for p in part.parts if not isinstance(p, Image))
    assert 1 + text + IMAGE_TOKENS * len(part.images) == tokens
    assert IMAGE_PATCHES * len(part.images) == patches


@pytest.fixture
def indexed(tmp_path: Path) -> Callable[..., Index]:
    return lambda *documents: index_of(documents, tmp_path)


def test_a_document_is_cut_as_late_as_possible(indexed: Callable[..., Index]) -> None:
    units = cut(indexed(page([10, 10, 10, 10, 10])), image_cost, 32, 100)
    assert units.start_piece.tolist() == [0, 3]
    assert units.stop_piece.tolist() == [3, 5]
    assert units.tokens.tolist() == [31, 21]
    assert [(item.key, item.reason) for item in units.split] == [("page", "2 slices")]


def test_a_piece_that_fits_no_pack_is_named_and_the_rest_is_used(
    indexed: Callable[..., Index],
) -> None:
    units = cut(indexed(page([5, 50, 5])), image_cost, 32, 100)
    assert units.start_piece.tolist() == [0, 2]
    assert units.pieces_refused == [1]
    assert units.split[0].reason == "2 slices; piece 2 of 3 needs 51 tokens, a pack holds 32"


def test_a_document_of_which_nothing_fits_is_refused(indexed: Callable[..., Index]) -> None:
    index = indexed(page([50], "long"), page([5], "image", images=True), page([5], "good"))
    units = cut(index, image_cost, 32, IMAGE_PATCHES - 1)
    assert {item.key: item.reason for item in units.refused} == {
        "long": "piece 1 of 1 needs 51 tokens, a pack holds 32",
        "image": "piece 1 of 1 needs 16 vision patches, a pack holds 15",
    }
    assert units.document.tolist() == [2]


def test_the_image_cost_is_asked_once_for_each_size(indexed: Callable[..., Index]) -> None:
    asked = []

    def counting(height: int, width: int) -> tuple[int, int]:
        asked.append((height, width))
        return 4, 16

    cut(indexed(page([5] * 6, images=True)), counting, 100, 1000)
    assert asked == [(8, 9)]
