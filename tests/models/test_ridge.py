"""The closed-form start: the solution itself, and that it lowers the caption loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_packing.document import Document
from data_packing.index import build_index
from data_packing.pack import collate, join_views
from data_packing.sharding import write_shards
from mllm.models import ridge
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.conftest import chat, documents, picture
from tests.models.families import FAMILIES, save_family
from tests.models.test_packed_equals_unpacked import logits_of, loss_of

NAMES = ("a red chair", "the cat", "a small green parrot", "the system user assistant")


def captions(count: int = 24) -> list[Document]:
    """Pictures whose seed decides their caption."""
    return [
        Document.caption(picture(number % 4), NAMES[number % 4], "captions", str(number))
        for number in range(count)
    ]


def caption_loss(model: MultimodalModel, processor: Processor) -> float:
    pack = collate([processor.encode(one) for one in captions(4)], 0)
    with torch.no_grad():
        return float(loss_of(logits_of(model, pack), pack.labels))


def test_solve_is_the_minimum() -> None:
    x, y = torch.randn(50, 6).double(), torch.randn(50, 3).double()
    weight, bias = ridge.solve(x, y, 0.1)
    penalty = 0.1 * (x - x.mean(0)).square().sum(0).mean()

    def objective(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (x @ w.T + b - y).square().sum() + penalty * w.square().sum()

    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    for gradient in torch.autograd.grad(objective(w, b), (w, b)):
        assert gradient.abs().max() < 1e-9
    exact_w, exact_b = ridge.solve(x, x @ weight.T + 3, 0)
    torch.testing.assert_close(exact_w, weight)
    torch.testing.assert_close(exact_b, torch.full((3,), 3.0).double())


def test_it_lowers_the_caption_loss(build: Callable[..., Any]) -> None:
    model, processor = build("clip", "average_pool")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_loss = caption_loss(model, processor)
    model.train()
    report = ridge.fit(model, [processor.encode(one) for one in captions()], strength=0.01)
    assert model.training
    model.eval()
    assert report.examples == 24
    assert report.explained > 0.9
    assert caption_loss(model, processor) < random_loss
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {f"connector.{n}" for n in ("norm.bias", "second.weight", "second.bias")}
    views = [processor.encode(one).pixels[0] for one in captions(4)]
    tokens = model.image_features(*join_views(views)).unflatten(0, (4, -1))
    table = model.get_input_embeddings().weight
    words = [torch.tensor(processor.tokenizer(name)["input_ids"]) for name in NAMES]
    wanted = torch.stack([table[ids].mean(0) for ids in words])
    wanted, found = wanted - wanted.mean(0), tokens.mean(1) - tokens.mean((0, 1))
    assert torch.cosine_similarity(found, wanted).min() > 0.9
    assert float(tokens.square().mean()) == pytest.approx(float(table.square().mean()), rel=0.05)


def test_a_scaled_embedding_is_matched_as_it_comes_out(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    """Gemma multiplies what it stores by the root of its width; visual tokens are as long."""
    model, processor = build("clip", "average_pool", save_family(tmp_path, FAMILIES["gemma"]))
    samples = [processor.encode(one) for one in captions()]
    ridge.fit(model, samples, strength=0.01)
    views = [sample.pixels[0] for sample in samples[:4]]
    with torch.no_grad():
        tokens = model.image_features(*join_views(views)).unflatten(0, (4, -1))
        embedding = model.get_input_embeddings()
        words = embedding(torch.arange(embedding.num_embeddings))
    assert float(tokens.square().mean()) == pytest.approx(float(words.square().mean()), rel=0.05)


def test_features_enter_without_their_common_mean(build: Callable[..., Any]) -> None:
    model, processor = build("clip", "average_pool")
    ridge.fit(model, [processor.encode(one) for one in captions()])
    caught: list[torch.Tensor] = []
    model.connector.norm.register_forward_hook(lambda *given: caught.append(given[2]))
    model.image_features(*join_views([processor.encode(one).pixels[0] for one in captions()]))
    assert caught[0].mean(0).abs().max() < 0.02 < caught[0].std()


def test_warm_start_picks_captions_from_the_sources(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    model, processor = build("clip", "average_pool")
    chats = [chat(number) for number in range(4)]
    mixed = [*captions(), *documents()[1:2], *documents()[3:]]
    indexes = [
        build_index(
            write_shards(one, tmp_path, name).paths, processor.cost, processor.text_fingerprint
        )
        for name, one in (("mixed", mixed), ("chats", chats))
    ]
    report = ridge.warm_start(model, processor, indexes, seed=3)
    assert report.examples == 24
    first = model.connector.second.weight.clone()
    _, again = build("clip", "average_pool")
    ridge.warm_start(model, again, indexes, seed=3)
    assert torch.equal(model.connector.second.weight, first)
    assert ridge.warm_start(model, processor, indexes, seed=3, limit=10).examples == 10
    with pytest.raises(ValueError, match="found 4 documents of one image"):
        ridge.warm_start(model, processor, indexes[1:], seed=0)
    assert np.isfinite(report.explained)
