from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_packing.pack import Pack, collate, join_views
from data_packing.sample import IGNORED, Sample


def sample(length: int, images: int = 0, side: int = 4, key: str = "k") -> Sample:
    ids = np.arange(1, length + 1, dtype=np.int64)
    pixels = [np.full((side, side, 3), number, dtype=np.uint8) for number in range(images)]
    return Sample(ids, ids.copy(), [], pixels, {}, "s", key)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), max_size=6))
def test_documents_lie_side_by_side_with_their_bounds(shapes: list[tuple[int, int]]) -> None:
    samples = [sample(length, images, key=str(at)) for at, (length, images) in enumerate(shapes)]
    pack = collate(samples, 7)
    assert pack.number == 7
    assert pack.keys == [str(at) for at in range(len(shapes))]
    assert pack.cu_seqlens.tolist() == np.cumsum([0, *(n for n, _ in shapes)]).tolist()
    assert pack.sizes.tolist() == [[4, 4]] * sum(images for _, images in shapes)
    assert len(pack.pixels) == 48 * len(pack.sizes)
    bounds = pack.cu_seqlens.tolist()
    for (length, _), start, stop in zip(shapes, bounds, bounds[1:], strict=False):
        assert pack.input_ids[start:stop].tolist() == list(range(1, length + 1))
        assert pack.position_ids[start:stop].tolist() == list(range(length))
        assert pack.labels[start:stop].tolist() == [IGNORED, *range(2, length + 1)]
    assert pack.learned == sum(length - 1 for length, _ in shapes)


def test_types_are_what_the_model_takes() -> None:
    pack = collate([sample(3, 2)], 0).to("cpu")
    kinds = [getattr(pack, name).dtype for name in ("input_ids", "labels", "position_ids")]
    assert kinds == [torch.int64] * 3
    assert pack.cu_seqlens.dtype == torch.int32
    assert pack.weights.dtype == torch.float32
    assert pack.pixels.dtype == torch.uint8
    assert pack.pixels.shape == (2 * 4 * 4 * 3,)
    assert pack.sizes.dtype == torch.int32
    assert pack.sizes.tolist() == [[4, 4], [4, 4]]


def test_views_of_any_sizes_lie_one_after_another() -> None:
    random = np.random.default_rng(0)
    views = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((2, 3), (5, 1))]
    cut = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)[1:4, 2:4]  # not contiguous
    documents = [sample(3), sample(3), sample(3)]
    documents[0].pixels, documents[2].pixels = views, [cut]
    pack = collate(documents, 0)
    assert pack.sizes.tolist() == [[2, 3], [5, 1], [3, 2]]
    parts = pack.pixels.split([18, 15, 18])
    for part, view in zip(parts, [*views, cut], strict=True):
        np.testing.assert_array_equal(part.numpy().reshape(view.shape), view)


def test_pixels_are_written_into_the_array_they_are_given() -> None:
    given = np.zeros(64, dtype=np.uint8)
    pixels, _ = join_views([np.full((2, 2, 3), 7, dtype=np.uint8)] * 2, lambda size: given[:size])
    assert pixels.data_ptr() == given.ctypes.data
    assert given.tolist() == [7] * 24 + [0] * 40


def test_sizes_stay_where_the_model_reads_them() -> None:
    moved = collate([sample(3, 2)], 0).to("meta")
    assert moved.pixels.device.type == "meta"
    assert moved.sizes.tolist() == [[4, 4], [4, 4]]


def test_across_documents_is_one_segment() -> None:
    pack = collate([sample(3), sample(2)], 0, across_documents=True)
    assert pack.cu_seqlens.tolist() == [0, 5]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert pack.labels.tolist() == [IGNORED, 2, 3, 1, 2]
    assert pack.across_documents
    assert pack.to("cpu").across_documents
    assert not collate([sample(5)], 0).across_documents


def test_samples_are_not_changed() -> None:
    one = sample(3)
    collate([one], 0)
    assert one.labels.tolist() == [1, 2, 3]


def test_the_empty_pack_learns_nothing() -> None:
    pack = Pack.empty()
    assert (pack.learned, len(pack.input_ids), len(pack.pixels)) == (0, 0, 0)
    assert pack.sizes.shape == (0, 2)
    assert pack.cu_seqlens.tolist() == [0]
    assert collate([], 3, across_documents=True).cu_seqlens.tolist() == [0]


def test_what_does_not_fit_together_is_refused() -> None:
    bad = sample(3, key="odd")
    bad.labels = bad.labels[:2]
    with pytest.raises(ValueError, match="'odd': 3 tokens but 2 labels"):
        collate([bad], 0)
