"""From a recipe to the things a run is made of: model, processor, plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import current_thread
from typing import Any

import torch

from data_packing.corpus import Corpus, Stop
from data_packing.executors import Executor
from data_packing.index import Index, build_index, source_names
from data_packing.ledger import Ledger, too_many
from data_packing.plan import Plan
from data_packing.wording import counted
from mllm.recipe import ModelSection, Recipe
from mllm.training import groups, lora
from mllm.training.pack_cost import pack_cost
from mllm.training.sources import shards

UNBOUNDED = 2**40
"""Vision patches of a pack when the recipe sets no limit."""


def model(
    section: ModelSection, recipe: Recipe, dtype: torch.dtype, weights: bool = True
) -> tuple[Any, Any, Any]:
    """The model with `requires_grad` set as the recipe says, adapters put in.

    Args:
        section: where the parts come from; the recipe's own, unless only a forecast is made.
        dtype: of all weights.
        weights: False reads none: the model is on the meta device, to be looked at.

    Returns:
        Model, processor, and PEFT's configuration of the adapters of each key that has some.
    """
    from mllm.models.assemble import assemble

    built, processor = assemble(section, dtype=dtype, weights=weights)
    groups.freeze(built, recipe.train)
    return built, processor, lora.adapt(built, recipe.train, recipe.run.seed)


def plan(
    recipe: Recipe,
    model: Any,
    processor: Any,
    workers: int,
    phase: Callable[[str], None] = lambda _: None,
    *,
    share: float = 0.0,
    judge: bool = True,
    seen: Mapping[int, str] | None = None,
    tell: Callable[[int, str], None] = lambda number, fingerprint: None,
) -> Plan:
    """Decide which documents make which pack of which step; counts the first window's tokens.

    Args:
        recipe, model, processor: of the stage.
        workers: processes that count tokens.
        phase: told what is being done.
        share: where to begin counting, 0 to 1; ranks that begin at different places share the work.
        judge: stop where more documents are refused than the recipe allows.
        seen, tell: as in `Plan`.

    Raises:
        ValueError: shards are missing or damaged, nothing can be used, or too much is refused.
    """
    sources, packing, run = shards(recipe), recipe.data.packing, recipe.run
    texts = [source.text for source in recipe.data.sources]
    names = source_names(sources, texts)
    executor = Executor("local", workers)
    first = current_thread()

    def index(source: int, paths: Sequence[Path], stop: Stop) -> Index:
        def count(missing: int) -> None:
            if current_thread() is first:  # later windows are counted while the run goes on
                phase(f"counting tokens of {names[source]}")

        cost, fingerprint = processor.cost, processor.text_fingerprint
        return build_index(
            paths,
            cost,
            fingerprint,
            executor,
            names[source],
            texts[source],
            begin=share,
            stop=stop,
            tell=count,
        )

    return Plan(
        Corpus(sources, index, window=recipe.data.window, seed=run.seed),
        [source.weight for source in recipe.data.sources],
        caps=[source.cap for source in recipe.data.sources],
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
        balance=pack_cost(recipe, model, processor),
        max_refused=recipe.data.max_refused if judge else 1.0,
        seen=seen,
        tell=tell,
    )


def check_refused(recipe: Recipe, ledger: Ledger) -> None:
    """Stop before a run that could not use more of its documents than the recipe allows.

    Raises:
        ValueError: a table of the reasons.
    """
    read = sum(counts.read for counts in ledger.counts.values())
    too_many(ledger.refused, read, recipe.data.max_refused, "documents")


def outline(plan: Plan) -> str:
    """The plan in one line: what is in its first window, which for most is all there is."""
    window = plan.first
    refused, read = window.all_refused(), window.records
    split = sum(len(units.split) for units in window.slices)
    line = (
        f"{counted(plan.total_steps, 'step')} of {counted(plan.packs_per_step, 'pack')} from "
        f"{counted(read, 'document')} ({len(refused):,} refused, {split:,} split)"
    )
    if plan.corpus.windows > 1:
        line += f" in the first of {plan.corpus.windows:,} windows"
    if refused:
        line += f"; the first refused: {refused[0].key}: {refused[0].reason}"
    return line
