"""Promises 2, 3 and 10 in one process: what one step computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_packing.loss_weights import Weighting
from data_packing.pack import Pack, collate
from data_packing.sample import Sample
from mllm.models.assemble import assemble
from mllm.objectives import OBJECTIVES
from mllm.recipe import ModelSection, OptimizerSection, TrainSection
from mllm.training import groups
from mllm.training.stage import threads_per_rank
from mllm.training.step import TrainStep
from tests.training import tiny
from tests.training.second import NAME, ToOnes

LEARNS = TrainSection(lr=1e-3)
FROZEN = TrainSection(frozen=True)
EVERYTHING = {"encoder": LEARNS, "connector": LEARNS, "language_model": LEARNS}


def make(
    home: Path,
    train: dict[str, TrainSection],
    connector: str = "mlp",
    objectives: tuple[str, ...] = ("language_modeling",),
) -> tuple[Any, Any]:
    """A TrainStep in training mode and its processor."""
    options = {"visual_tokens": 1} if connector == "average_pool" else {}
    section = tiny.recipe(home, home)["model"] | {"connector": {"name": connector, **options}}
    torch.manual_seed(0)
    model, processor = assemble(ModelSection.model_validate(section))
    groups.freeze(model, train)
    step = TrainStep(model, objectives, capacity=64)
    return step.train(), processor


def samples(processor: Any) -> list[Sample]:
    """Captions and texts, mixed."""
    documents = [*tiny.captions(4), *tiny.texts(2)]
    order = [0, 4, 1, 2, 5, 3]
    return [processor.encode(documents[i]) for i in order]


def run(step: TrainStep, pack: Pack) -> Tensor:
    """The pack's loss sum."""
    return sums(step, pack).sum()


def sums(step: TrainStep, pack: Pack) -> Tensor:
    """The sum of each objective over the pack."""
    return step(
        pack.input_ids,
        pack.labels,
        pack.weights,
        pack.position_ids,
        pack.cu_seqlens,
        pack.pixels,
        pack.sizes,
        pack.order,
        pack.bags,
        pack.asked,
    )


def gradients(step: TrainStep) -> dict[str, Tensor]:
    """All gradients so far."""
    return {n: p.grad.clone() for n, p in step.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("connector", "rule"),
    [("mlp", "token"), ("average_pool", "token"), ("mlp", "sample"), ("mlp", "sqrt")],
)
def test_packed_equals_unpacked(home: Path, connector: str, rule: str) -> None:
    step, processor = make(home, EVERYTHING, connector)
    documents, weighting = samples(processor), Weighting(rule)
    pack = collate(documents, 0, weighting=weighting)
    packed = run(step, pack)
    packed.backward()
    expected = gradients(step)
    step.zero_grad()

    alone, weight = torch.zeros(()), 0.0
    for i, document in enumerate(documents):
        one = collate([document], i, weighting=weighting)
        loss = run(step, one)
        loss.backward()
        alone += loss.detach()
        weight += one.weights.sum().item()
    assert pack.weights.sum().item() == pytest.approx(weight, rel=1e-6)
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    got = gradients(step)
    assert got.keys() == expected.keys()
    assert len(got) == len(list(step.parameters()))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_loss_is_the_plain_cross_entropy_at_learned_positions(home: Path) -> None:
    step, processor = make(home, EVERYTHING)
    documents = samples(processor)
    pack = collate(documents, 0)
    with torch.no_grad():
        got = run(step, pack)
        hidden = step.model.hidden_states(
            input_ids=pack.input_ids[None],
            pixels=pack.pixels,
            sizes=pack.sizes,
            order=pack.order,
            position_ids=pack.position_ids[None],
            cu_seqlens=pack.cu_seqlens,
        )
        logits = step.model.lm_head(hidden)[0]
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], pack.labels[1:], ignore_index=-100, reduction="none"
        )
    assert pack.learned == int((pack.labels[1:] != -100).sum())
    torch.testing.assert_close(got, losses.sum())

    ends = [end - 1 for end in pack.cu_seqlens.tolist()[1:]]
    of_documents = losses.tensor_split(ends[:-1])
    for rule, power in (("sample", 1.0), ("sqrt", 0.5)):
        with torch.no_grad():
            got = run(step, collate(documents, 0, weighting=Weighting(rule)))
        expected = sum(part.sum() / (part != 0).sum() ** power for part in of_documents)
        torch.testing.assert_close(got, expected)


def test_every_objective_has_its_own_sum_and_weights(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, NAME, ToOnes)
    plain, processor = make(home, EVERYTHING)
    step, _ = make(home, EVERYTHING, objectives=("language_modeling", NAME))
    documents = samples(processor)
    pack = collate(documents, 0, weighting=Weighting("sqrt", ((1, 1),)), sources=[0] * 6)
    with torch.no_grad():
        language, ones = sums(step, pack)
        alone = run(plain, collate(documents, 0, weighting=Weighting("sqrt")))
        pack.weights[0] = 0
        silenced = sums(step, pack)
        empty = sums(step, Pack.empty(2))
    torch.testing.assert_close(language, alone)
    assert ones > 0
    assert silenced.tolist() == [0, ones.item()]
    assert empty.tolist() == [0, 0]


def test_a_rank_without_a_pack_gives_zero_loss_and_zero_gradients(home: Path) -> None:
    step, _ = make(home, EVERYTHING)
    loss = run(step, Pack.empty())
    assert loss.item() == 0
    loss.backward()
    trained = [n for n, p in step.named_parameters() if p.requires_grad and p.grad is not None]
    assert any("connector" in name for name in trained)
    assert all(grad.abs().max() == 0 for grad in gradients(step).values())


def test_frozen_modules_get_no_gradients_and_no_graph(home: Path) -> None:
    train = {"encoder": FROZEN, "connector": LEARNS, "language_model": FROZEN}
    step, processor = make(home, train)
    features: list[Tensor] = []
    step.model.encoder.register_forward_hook(lambda *args: features.append(args[-1]))
    embedded: list[Tensor] = []
    step.model.get_input_embeddings().register_forward_hook(lambda *a: embedded.append(a[-1]))
    run(step, collate(samples(processor), 0)).backward()
    with_gradients = set(gradients(step))
    assert with_gradients == {
        name for name, _ in step.named_parameters() if name.startswith("model.connector.")
    }
    assert not features[0].requires_grad
    assert features[0].grad_fn is None
    assert not embedded[0].requires_grad
    assert not step.model.encoder.training

    made = groups.parameter_groups(step.model, train, OptimizerSection())
    trained = {name for group in made for name in group.parameters}
    assert all(name.startswith("connector.") for name in trained)


def test_the_head_runs_as_often_whatever_is_learned(home: Path) -> None:
    step, processor = make(home, EVERYTHING)
    objective = step.objectives["language_modeling"]
    objective.calls = 3
    calls: list[int] = []
    step.model.lm_head.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    with torch.no_grad():
        run(step, collate(samples(processor), 0))
        assert len(calls) == 3
        calls.clear()
        run(step, Pack.empty())
    assert calls == [0, 0, 0]


def test_the_number_of_calls_follows_from_the_capacity() -> None:
    from mllm.objectives import LanguageModeling

    assert LanguageModeling(capacity=4096, vocabulary=49152).calls == 4
    assert LanguageModeling(capacity=256, vocabulary=49152).calls == 1
    assert LanguageModeling(capacity=32768, vocabulary=152064).calls == 75


def test_threads_are_shared_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert threads_per_rank(2) == 4
    assert threads_per_rank(16) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_rank(2) == 3


def test_a_model_section_is_passed_on_as_written() -> None:
    section = ModelSection.model_validate({"from": "x", "connector": {"visual_tokens": 4}})
    assert section.model_dump(by_alias=True, exclude_none=True) == {
        "from": "x",
        "connector": {"visual_tokens": 4},
    }
