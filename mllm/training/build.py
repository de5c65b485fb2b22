"""From a recipe to the things a run is made of: model, processor, indexes, plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data_packing.executors import Executor
from data_packing.index import Index, build_index, source_names
from data_packing.ledger import too_many
from data_packing.plan import Plan
from mllm.recipe import ModelSection, Recipe
from mllm.training import groups, lora
from mllm.training.pack_cost import pack_cost
from mllm.training.sources import shards

UNBOUNDED = 2**40
"""Vision patches of a pack when the recipe sets no limit."""


LANGUAGE_MODEL = "language_model"


@dataclass(slots=True)
class Data:
    """What a stage learns from: one index per source, and the plan over them."""

    indexes: list[Index]
    plan: Plan


def model(section: ModelSection, recipe: Recipe, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The model with `requires_grad` set as the recipe says, adapters put in.

    Args:
        section: where the parts come from; the recipe's own, unless only a forecast is made.
        dtype: of all weights.

    Returns:
        Model, processor, and PEFT's configuration of the adapters (None without).
    """
    from mllm.models.assemble import assemble

    built, processor = assemble(section, dtype=dtype)
    groups.freeze(built, recipe.train)
    how = recipe.train.get(LANGUAGE_MODEL)
    adapter = None
    if how is not None and how.lora is not None:
        torch.manual_seed(recipe.run.seed)
        adapter = lora.inject(built.language_model, how.lora)
    return built, processor, adapter


def indexes(
    recipe: Recipe, processor: Any, workers: int, phase: Callable[[str], None] = lambda _: None
) -> list[Index]:
    """Count the tokens of every document; the counts are kept beside the shards."""
    found, executor = [], Executor("local", workers)
    sources, texts = shards(recipe), [source.text for source in recipe.data.sources]
    cost, counted_by = processor.cost, processor.text_fingerprint
    for paths, name, text in zip(sources, source_names(sources, texts), texts, strict=True):
        phase(f"counting tokens of {name}")
        found.append(build_index(paths, cost, counted_by, executor, name, text))
    return found


def plan(recipe: Recipe, model: Any, processor: Any, indexes: list[Index]) -> Plan:
    """Decide which documents make which pack of which step."""
    packing, run = recipe.data.packing, recipe.run
    return Plan(
        indexes,
        [source.weight for source in recipe.data.sources],
        processor_fingerprint=processor.fingerprint,
        image_cost=processor.image_cost,
        tokens=packing.tokens,
        patches=packing.patches or UNBOUNDED,
        tokens_per_step=run.tokens_per_step,
        seed=run.seed,
        max_documents=packing.documents,
        epochs=run.epochs,
        token_budget=run.tokens,
        across_documents=packing.across_documents,
        balance=pack_cost(recipe, model),
    )


def data(
    recipe: Recipe, model: Any, processor: Any, workers: int, phase: Callable[[str], None]
) -> Data:
    """Indexes and plan, saying what is being done."""
    found = indexes(recipe, processor, workers, phase)
    phase("planning")
    planned = plan(recipe, model, processor, found)
    assert planned.total_steps > 0
    return Data(found, planned)


def check_refused(recipe: Recipe, plan: Plan) -> None:
    """Stop before a run that could not use more of its documents than the recipe allows.

    Raises:
        ValueError: a table of the reasons.
    """
    ledger = plan.ledger
    read = sum(counts.read for counts in ledger.counts.values())
    too_many(ledger.refused, read, recipe.data.max_refused, "documents")


def outline(plan: Plan) -> str:
    """The plan in one line."""
    facts = plan.summary()
    line = (
        f"{facts['documents']:,} documents ({facts['refused']} refused, {facts['split']} split) "
        f"in {facts['packs']:,} packs {facts['efficiency']:.1%} full, {facts['steps']:,} steps"
    )
    if facts["refused"]:
        first = facts["reasons"][0]
        line += f"; the first refused: {first['key']}: {first['reason']}"
    return line
