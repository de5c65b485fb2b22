"""What a run will be, before it starts: `mllm plan`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from data_packing.balance import straggler
from data_packing.plan import Plan
from data_packing.wording import counted
from mllm.recipe import MODULES, ConnectorSection, ModelSection, Recipe, load_all
from mllm.training import build, engine

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
        model, processor, _ = build.model(section, recipe, torch.float32)
        console.print(f"\n[bold]{file}[/bold] → {recipe.output}")
        console.print(parameter_table(model))
        data = build.data(recipe, model, processor, recipe.data.workers, say)
        print_plan(console, recipe, data)
        try:
            build.check_refused(recipe, data.plan)
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


def parameter_table(model: nn.Module) -> Table:
    """Parameters and trainable parameters by module."""
    table = Table(title="Parameters")
    table.add_column("module")
    for name in ("all", "trainable", "in adapters"):
        table.add_column(name, justify="right")
    totals = [0, 0, 0]
    counts = {name: [0, 0, 0] for name in MODULES}
    for name, parameter in model.named_parameters():
        row = counts[name.split(".")[0]]
        adapted = ".lora_" in name
        row[0] += 0 if adapted else parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
        row[2] += parameter.numel() if adapted else 0
    for name, row in counts.items():
        table.add_row(name, *(f"{value:,}" for value in row))
        totals = [a + b for a, b in zip(totals, row, strict=True)]
    table.add_section()
    table.add_row("together", *(f"{value:,}" for value in totals))
    return table


def mixture_table(plan: Plan) -> Table:
    """What the weights ask for, beside what the run holds."""
    table = Table(title="Mixture")
    for name in ("source", "passes per epoch", "asked", "got", "of the tokens"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for source, share in plan.shares().items():
        parts = (f"{share[name]:.2%}" for name in ("asked", "got", "tokens"))
        table.add_row(source, f"{share['weight']:g}", *parts)
    return table


def waiting(plan: Plan) -> str:
    """How much ranks wait for the slowest, by the cost that balances the plan; its first block."""
    cost, ranks = plan.balance, [world for world in RANKS if world <= plan.packs_per_step]
    if cost is None or not ranks:
        return "not balanced" if cost is None else "no step has packs for two ranks"
    steps = itertools.takewhile(lambda step: step.after.block == 0, plan.steps())
    costs = [step.costs(cost) for step in steps] or [next(plan.steps()).costs(cost)]
    return ", ".join(f"{straggler(costs, world):.3f} of {world}" for world in ranks)


def print_plan(console: Console, recipe: Recipe, data: build.Data) -> None:
    """Tokens, packs, steps, what is left out and why."""
    facts: dict[str, Any] = data.plan.summary()
    precision, why = engine.choose_precision(recipe)
    console.print(data.plan.ledger.table())
    if facts["unreached"]:
        console.print(UNREACHED, highlight=False)
    console.print(mixture_table(data.plan))
    table = Table(title="Run", show_header=False)
    rows = {
        "useful tokens": f"{facts['tokens']:,}",
        "packs": f"{facts['packs']:,} of {recipe.data.packing.tokens:,} tokens",
        "packing efficiency": f"{facts['efficiency']:.2%}",
        "steps": f"{facts['steps']:,} of {counted(facts['packs_per_step'], 'pack')}",
        "slowest rank / mean": waiting(data.plan),
        "precision here": f"{precision} ({why})" if why else precision,
        "plan": facts["hash"][:16],
    }
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
