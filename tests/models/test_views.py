"""Views of different sizes from samples to visual tokens, with an encoder that takes them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_packing.pack import collate, join_views
from data_packing.sample import Sample
from mllm.models.encoders import VisionEncoder
from mllm.models.images import Images
from mllm.models.modeling import MultimodalModel
from mllm.models.views import repeat_rows
from tests.models.test_packed_equals_unpacked import gradients, logits_of, loss_of

PATCH = 4
SIZES = [[(8, 12)], [(16, 8), (8, 8), (16, 8)], [], [(12, 12), (8, 20)]]
"""Of the views of each document."""


class Patches(VisionEncoder):
    """A linear map of every 4 x 4 patch of views of any size."""

    width = 16

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.project = nn.Linear(3 * PATCH**2, self.width)

    @classmethod
    def spec_from_folder(cls, path: str | Path, **options: Any) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def of(cls, other: VisionEncoder) -> Self:
        return cls({"geometry": other.geometry.to_dict()})

    def load_weights(self, path: str | Path) -> None:
        raise NotImplementedError

    def grids(self, sizes: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
        return [(height // PATCH, width // PATCH) for height, width in sizes]

    def forward(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        views = pixels.split((3 * sizes.prod(dim=1)).tolist())
        cells = [
            self.normalised(view.view(rows, PATCH, columns, PATCH, 3)).transpose(1, 2).flatten(0, 1)
            for view, (rows, columns) in zip(views, self.grids(sizes.tolist()), strict=True)
        ]
        features: Tensor = self.project(torch.cat(cells).flatten(1))
        return features


def samples(model: MultimodalModel) -> list[Sample]:
    """Documents of words and views; an image's tokens are as many as its view makes."""
    random = np.random.default_rng(0)
    made = []
    for sizes in SIZES:
        views = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        ids = random.integers(3, 290, 4).tolist()
        for count in model.tokens_per_view(join_views(views)[1]):
            ids += [model.config.image_token_id] * count + random.integers(3, 290, 5).tolist()
        tokens = np.array(ids)
        labels = np.where(tokens == model.config.image_token_id, -100, tokens)
        made.append(Sample(tokens, labels, [], views))
    return made


@pytest.fixture(params=["mlp", "average_pool"])
def model(build: Callable[..., Any], request: pytest.FixtureRequest) -> MultimodalModel:
    made: MultimodalModel = build("clip", request.param)[0]
    made.encoder = Patches.of(made.encoder)
    return made


def test_packed_equals_unpacked(model: MultimodalModel) -> None:
    model.train()
    pack = collate(samples(model), 0)
    assert len(set(map(tuple, pack.sizes.tolist()))) == 5
    logits = logits_of(model, pack)
    loss_of(logits, pack.labels).backward()
    packed = gradients(model)
    alone = []
    for sample in samples(model):
        one = collate([sample], 0)
        alone.append(logits_of(model, one, packed=False))
        loss_of(alone[-1], one.labels).backward()
    unpacked = gradients(model)
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-5)
    assert packed.keys() == unpacked.keys() == dict(model.named_parameters()).keys()
    for name, expected in unpacked.items():
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(packed[name] / scale, expected / scale, rtol=0, atol=1e-5)


def test_every_part_runs_once_whatever_the_views_are(model: MultimodalModel) -> None:
    calls: list[str] = []
    for name in ("encoder", "connector"):
        part = getattr(model, name)
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.train()
    for chosen in (samples(model), samples(model)[2:3], []):
        pack = collate(chosen, 0)
        ids = pack.input_ids if chosen else torch.zeros(2, dtype=torch.int64)
        model.hidden_states(ids, pack.pixels, pack.sizes)
        assert calls == ["encoder", "connector"]
        calls.clear()


def test_beams_of_rows_whose_views_make_different_numbers_of_tokens(model: MultimodalModel) -> None:
    model.generation_config.eos_token_id = None
    chosen = samples(model)
    longest = max(len(sample.input_ids) for sample in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(chosen):
        size = len(sample.input_ids)
        ids[row, longest - size :], mask[row, longest - size :] = torch.tensor(sample.input_ids), 1
    beams = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    pixels, sizes = join_views([view for sample in chosen for view in sample.pixels])
    together = model.generate(ids, attention_mask=mask, pixels=pixels, sizes=sizes, **beams)
    for row, sample in enumerate(chosen):
        one = torch.tensor(sample.input_ids)[None]
        pixels, sizes = join_views(sample.pixels)
        alone = model.generate(one, pixels=pixels, sizes=sizes, **beams)
        assert torch.equal(together[2 * row : 2 * row + 2, longest:], alone[:, one.shape[1] :])


def test_rows_are_repeated_with_their_views() -> None:
    views = [np.full((side, 2, 3), side, dtype=np.uint8) for side in (1, 2, 3)]
    asked = torch.tensor([[7, 8], [7, -1], [9, 9]])
    images = Images(*join_views(views), asked=asked)
    repeated = repeat_rows(images, [4, 2, 5], wanted=[6, 0, 5], times=2)
    assert repeated.pixels is not None
    assert repeated.sizes is not None
    assert repeated.asked is not None
    assert repeated.sizes[:, 0].tolist() == [1, 2, 1, 2, 3, 3]
    assert repeated.asked[:, 0].tolist() == [7, 7, 7, 7, 9, 9]
    parts = repeated.pixels.split((3 * repeated.sizes.prod(dim=1)).tolist())
    assert [set(part.tolist()) for part in parts] == [{1}, {2}, {1}, {2}, {3}, {3}]
    with pytest.raises(ValueError, match="^row 1 has 3 image tokens and so ends inside a view$"):
        repeat_rows(images, [4, 2, 5], wanted=[3, 3, 5], times=2)
