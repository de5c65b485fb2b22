"""Language models with experts: ranks whose tokens choose differently stay in step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_packing.planned import PlannedPack, micro_packs
from mllm.models.assemble import load
from mllm.recipe import load as load_recipe
from mllm.training import build
from tests.training import tiny
from tests.training.conftest import Runs

CLOSE = 2e-5
TEXTS = 1  # the source without images


def test_one_rank_has_images_and_the_other_none(two: Runs) -> None:
    recipe = load_recipe(two.path / "mixtral.yaml")
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    plan = build.plan(recipe, model, processor, 0)

    def images(pack: PlannedPack | None) -> bool:
        return pack is not None and any(entry.source != TEXTS for entry in pack.entries)

    alone = 0
    for step in plan.steps():
        pairs = zip(micro_packs(step, 0, 2), micro_packs(step, 1, 2), strict=True)
        alone += sum(images(one) != images(other) for one, other in pairs)
    assert alone > 1


@pytest.mark.parametrize("name", tiny.EXPERTS)
def test_two_sharded_ranks_train_as_one_process(one: Runs, two: Runs, name: str) -> None:
    losses, norms = one.losses(name), one.gradient_norms(name)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3
    assert two.losses(name) == pytest.approx(losses, abs=CLOSE)
    assert two.gradient_norms(name) == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("name", tiny.EXPERTS)
def test_what_was_trained_loads_again(home: Path, one: Runs, two: Runs, name: str) -> None:
    models = []
    for runs in (one, two):
        model, processor = load(runs.path / name, dtype=torch.float32)
        models.append(model)
    prompt = processor.prompt(next(tiny.captions(1)))
    with torch.no_grad():
        wanted, found = (model(**prompt).logits for model in models)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    before, after = load_file(home / name / "model.safetensors"), two.weights(name)
    assert {f"language_model.{key}" for key in before} <= after.keys()
    moved = [
        key
        for key, weight in before.items()
        if "expert" in key and not torch.equal(after[f"language_model.{key}"], weight)
    ]
    assert len(moved) == len([key for key in before if "expert" in key]) > 0
