"""From a recipe to the things a run is made of: model, processor, indexes, plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_packing.index import Index, build_index
from data_packing.plan import Plan
from data_packing.shards import expand
from mllm.recipe import Recipe

UNBOUNDED = 2**40
"""Vision patches of a pack when the recipe sets no limit."""


@dataclass(slots=True)
class Data:
    """What a stage learns from: one index per source, and the plan over them."""

    indexes: list[Index]
    plan: Plan


def shards(recipe: Recipe) -> list[list[Path]]:
    """The shards of every source.

    Raises:
        ValueError: when a source's pattern matches nothing.
    """
    found = []
    for i, source in enumerate(recipe.data.sources):
        try:
            found.append(expand(source.path))
        except (ValueError, OSError) as error:
            raise ValueError(f"data.sources.{i}.path: {error}") from None
    return found


def indexes(recipe: Recipe, processor: Any, workers: int) -> list[Index]:
    """Count the tokens of every document; the counts are kept beside the shards."""
    return [
        build_index(paths, processor.cost, processor.text_fingerprint, workers)
        for paths in shards(recipe)
    ]


def plan(recipe: Recipe, processor: Any, indexes: list[Index]) -> Plan:
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
    )


def data(recipe: Recipe, processor: Any, workers: int, phase: Callable[[str], None]) -> Data:
    """Indexes and plan, saying what is being done."""
    phase("counting tokens")
    found = indexes(recipe, processor, workers)
    phase("planning")
    planned = plan(recipe, processor, found)
    assert planned.total_steps > 0
    return Data(found, planned)


def parent_id(recipe: Recipe) -> str | None:
    """The identity of the stage that `model.from` names, None when it names no stage.

    Raises:
        ValueError: when there is nothing at that path, or the stage is not finished.
    """
    from mllm.training.run_folder import RunFolder

    if recipe.model.from_ is None:
        return None
    folder = RunFolder(Path(recipe.model.from_))
    finished = folder.finished()
    if finished is not None:
        return str(finished["weights"])
    if folder.begun() is not None:
        raise ValueError(
            f"model.from: the stage in {folder.path} has not finished; run it to its end first"
        )
    return None
