"""What a run will be, before it starts: `mllm plan`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data_packing.account import Account, summary
from data_packing.balance import straggler
from data_packing.ledger import Ledger
from data_packing.plan import STEPS, Plan
from data_packing.wording import counted
from mllm.recipe import ConnectorSection, ModelSection, Recipe, load_all
from mllm.training import build, engine
from mllm.training.parameters import parameter_table

SHOWN_REASONS = 10
UNREACHED = "  unreached: the run ends before them, or a weight below 1 leaves them out"
RANKS = (2, 8, 64)
"""For which the waiting of ranks is told, where a step has a pack for each."""


def forecast(path: Path, overrides: Sequence[str], console: Console | None = None) -> int:
    """Print what every stage of a recipe or folder will be.

    A stage that starts from one that has not run yet is forecast with that stage's parts.

    Returns:
        The exit status: 1 where the training of a stage would stop for want of usable documents.

    Raises:
        ValueError: as `mllm train` would refuse it.
    """
    console = console or Console()
    stages, status = load_all(path, overrides), 0

    def say(phase: str) -> None:
        console.print(f"{phase} …", markup=False, highlight=False)

    for file, recipe in stages:
        section = origin(recipe, [other for _, other in stages])
        model, processor, _ = build.model(section, recipe, torch.float32, weights=False)
        console.print(f"\n[bold]{file}[/bold] → {recipe.output}")
        console.print(parameter_table(model))
        plan = build.plan(recipe, model, processor, recipe.data.workers, say, judge=False)
        ledger = print_plan(console, recipe, plan)
        try:
            build.check_refused(recipe, ledger)
        except ValueError as error:
            console.print(f"  training would stop: {error}", markup=False, highlight=False)
            status = 1
    return status


def origin(recipe: Recipe, stages: Sequence[Recipe]) -> ModelSection:
    """The recipe's model section, or that of the stage which will make its parent.

    Options of the connector that the recipe changes are kept.
    """
    start = recipe.model.from_
    if start is None or (Path(start) / "config.json").exists():
        return recipe.model
    for other in stages:
        if other is not recipe and other.output.resolve() == Path(start).resolve():
            section = origin(other, stages)
            changes = (
                recipe.model.connector.model_dump(exclude_none=True)
                if (recipe.model.connector is not None)
                else {}
            )
            before = section.connector.model_dump(exclude_none=True) if section.connector else {}
            connector = ConnectorSection(**(before | changes)) if before or changes else None
            return section.model_copy(update={"connector": connector})
    return recipe.model


def mixture_table(plan: Plan, found: Account) -> Table:
    """What the weights ask for, beside what the run holds."""
    table = Table(title="Mixture")
    for name in ("source", "passes per epoch", "asked", "got", "of the tokens"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for rate, (source, share) in zip(plan.rates, found.shares().items(), strict=True):
        parts = (f"{share[name]:.2%}" for name in ("asked", "got", "tokens"))
        cap = "" if rate.cap is None else f", at most {rate.cap:,}"
        table.add_row(source, f"{rate.weight:g}{cap}", *parts)
    return table


def waiting(plan: Plan) -> str:
    """How much ranks wait for the slowest, by the cost that balances the plan; its first steps."""
    cost, ranks = plan.balance, [world for world in RANKS if world <= plan.packs_per_step]
    if cost is None or not ranks:
        return "not balanced" if cost is None else "no step has packs for two ranks"
    costs = [step.costs(cost) for step in itertools.islice(plan.steps(), STEPS)]
    return ", ".join(f"{straggler(costs, world):.3f} of {world}" for world in ranks)


def print_plan(console: Console, recipe: Recipe, plan: Plan) -> Ledger:
    """Tokens, packs, steps, what is left out and why; returns the ledger."""
    facts, found = summary(plan)
    precision, why = engine.choose_precision(recipe)
    console.print(found.ledger.table())
    if facts["unreached"]:
        console.print(UNREACHED, highlight=False)
    console.print(mixture_table(plan, found))
    table = Table(title="Run", show_header=False)
    rows = {
        "useful tokens": f"{facts['tokens']:,}",
        "packs": f"{facts['packs']:,} of {recipe.data.packing.tokens:,} tokens",
        "packing efficiency": f"{facts['efficiency']:.2%}",
        "steps": f"{facts['steps']:,} of {counted(facts['packs_per_step'], 'pack')}",
        "slowest rank / mean": waiting(plan),
        "windows": f"{facts['windows']:,}",
        "precision here": f"{precision} ({why})" if why else precision,
        "plan": facts["hash"][:16],
    }
    if facts["windows"] == 1:
        del rows["windows"]
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    reasons = facts["reasons"]
    for refusal in reasons[:SHOWN_REASONS]:
        console.print(
            f"  refused: {refusal['source']} {refusal['key']}: {refusal['reason']}", markup=False
        )
    if len(reasons) > SHOWN_REASONS:
        console.print(f"  … and {len(reasons) - SHOWN_REASONS} more, all in the run's ledger.jsonl")
    return found.ledger
