"""Images that see themselves in both directions: attention beside a dense mask."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mllm.models import backends
from mllm.models.blocks import image_blocks

BOUNDS = (0, 5, 9, 12, 20)
IMAGES = [0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 2, 2, 2, 2, 0]


def dense(window: int | None) -> Tensor:
    """What sees what, written out, bool [20, 20]."""
    seen = torch.zeros(20, 20, dtype=torch.bool)
    for low, high in pairwise(BOUNDS):
        for query in range(low, high):
            for key in range(low, high):
                past = key <= query and (window is None or key > query - window)
                image = IMAGES[query] > 0 and IMAGES[query] == IMAGES[key] and key > query
                seen[query, key] = past or image
    return seen


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 2, 3])
def test_documents_with_images_and_without(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    blocks = image_blocks(torch.tensor([IMAGES]) > 0, BOUNDS)
    assert blocks is not None
    assert blocks.documents == (True, False, False, True)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    found = backends.attend_in_documents(
        q, k, v, bounds, BOUNDS, 0.3, window, 0.0, softcap, None, blocks
    )
    wanted = backends.attend_exactly(q, k, v, dense(window), 0.3, softcap, None, 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    plain = backends.attend_in_documents(q, k, v, bounds, BOUNDS, 0.3, window, 0.0, softcap)
    assert torch.equal(found[:, 5:12], plain[:, 5:12])
    assert (found - plain).abs().max() > 1e-2


def test_ordinary_rows_open_the_mask_that_they_have() -> None:
    """Padding stays unseen, and what was cached stays seen."""
    blocks = image_blocks(torch.tensor([[False, True, True], [True, True, False]]))
    assert blocks is not None
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    image = blocks.opened(None, 3)[:, 0]
    assert image[0].int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert image[1].int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    cached = blocks.opened(None, 5)[0, 0]
    assert cached[:, :2].all()
    assert torch.equal(cached[:, 2:], image[0])
    padded = causal & torch.tensor([False, True, True])
    assert not blocks.opened(padded[None, None], 3)[0, 0, :, 0].any()


def test_rows_without_images_have_no_blocks() -> None:
    assert image_blocks(torch.zeros(2, 4, dtype=torch.bool)) is None
    assert image_blocks(torch.zeros(1, 20, dtype=torch.bool), BOUNDS) is None
