"""The quick start's figures over several seeds, with spread, intervals, bars, time and machine.

    python -m benchmarks.quickstart --seeds 0 1 2     # trains every seed, then measures: an hour
    python -m benchmarks.quickstart --reuse           # measures what an earlier run trained

Every seed is the whole folder recipes/quickstart under `mllm train`, stage after stage, in
outputs/benchmark/seed-N. A run that was stopped goes on when the command is typed again. Figures of
`python -m benchmarks.loop` are shown beside them where its results lie.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mllm.evaluation import machine
from mllm.evaluation.measure import BARS, Bar
from mllm.evaluation.report import evaluate, progress, write
from mllm.evaluation.wording import (
    interval_text,
    limit_text,
    loss_text,
    percent_text,
    value_text,
    whole_text,
)
from mllm.recipe import load, stages

RECIPES = Path("recipes/quickstart")
OUTPUTS = Path("outputs/benchmark")
RESULTS = Path(__file__).parent / "results"
COSTS = "cost.json"


@dataclass(slots=True)
class Seed:
    """One seed's run.

    Attributes:
        seed: of training and of everything drawn in the evaluation.
        folder: holds its stages.
        costs: by stage, what its commands took: wall and CPU seconds, start-up included.
        report: what `mllm.evaluation.report.evaluate` found.
    """

    seed: int
    folder: Path
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def commands(
    recipes: Path, seed: int, outputs: Path, cpus: int, extra: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """(stage, `mllm train` command) of every stage, its folders moved below `outputs`."""
    result = []
    homes: dict[str, str] = {}
    for file in stages(recipes):
        recipe = load(file, list(extra))
        home = str(outputs / file.stem)
        changed = [f"run.seed={seed}", f"run.output={home}", *extra]
        if recipe.model.from_:
            before = homes.get(str(Path(recipe.model.from_)), recipe.model.from_)
            changed.append(f"model.from={before}")
        homes[str(recipe.output)] = home
        train = [sys.executable, "-m", "mllm.cli", "train", str(file), *changed]
        result.append((file.stem, [*train, "--cpus", str(cpus)]))
    return result


def train(seed: Seed, recipes: Path, cpus: int, extra: Sequence[str]) -> None:
    """Run the stages that are not finished, noting what each took.

    Raises:
        SystemExit: a stage failed or was stopped; its own message was shown.
    """
    seed.folder.mkdir(parents=True, exist_ok=True)
    for stage, command in commands(recipes, seed.seed, seed.folder, cpus, extra):
        if (seed.folder / stage / "FINISHED").is_file():
            continue
        started, cpu = time.monotonic(), _children_cpu()
        status = subprocess.run(command, check=False).returncode
        spent = seed.costs.setdefault(stage, {"wall": 0.0, "cpu": 0.0})
        spent["wall"] += time.monotonic() - started
        spent["cpu"] += _children_cpu() - cpu
        (seed.folder / COSTS).write_text(json.dumps(seed.costs, indent=1))
        if status:
            raise SystemExit(status)


def read_costs(folder: Path) -> dict[str, dict[str, float]]:
    """What earlier commands took, {} where nobody noted it."""
    try:
        return dict(json.loads((folder / COSTS).read_text()))
    except (OSError, ValueError):
        return {}


def measure(seed: Seed, data: Path, console: Console, command: str) -> None:
    """Evaluate one seed's result and write its report."""
    with progress(console) as advance:
        seed.report, pictures = evaluate(
            seed.folder, data, seed.seed, advance=advance, command=command
        )
    write(seed.report, pictures, seed.folder)


def markdown(seeds: Sequence[Seed], rivals: Sequence[dict[str, Any]], command: str) -> str:
    """The result as a page of Markdown."""
    lines = [
        "# Quick start",
        "",
        f"`{command}`",
        "",
        f"{time.strftime('%Y-%m-%d')}, {machine.describe()}. "
        + ", ".join(f"{name} {number}" for name, number in machine.versions().items())
        + ".",
        "",
        "Held-out images and captions, split by caption. Each cell: the value, and below the table "
        "its 95 % bootstrap interval over captions. Loss gaps in nats per token.",
        "",
    ]
    heads = ["figure", *(f"seed {seed.seed}" for seed in seeds), "mean", "spread", "bar", ""]
    rows, intervals = [], []
    for name, bar in BARS.items():
        row, interval = _figure_rows(name, bar, seeds)
        rows.append(row)
        intervals.append(interval)
    lines += _table(heads, rows)
    lines += ["", "Intervals:", ""]
    lines += _table(["figure", *(f"seed {seed.seed}" for seed in seeds)], intervals)
    lines += ["", "## Parts", "", *_parts(seeds), "", "## Time", "", *_times(seeds)]
    if rivals:
        lines += ["", "## The single-process loop (`python -m benchmarks.loop`)", ""]
        lines += _rivals(rivals)
    return "\n".join(lines) + "\n"


def _figure_rows(name: str, bar: Bar, seeds: Sequence[Seed]) -> tuple[list[str], list[str]]:
    figures = [seed.report["figures"][name] for seed in seeds]
    cells = [value_text(bar, f["value"]) if "value" in f else "–" for f in figures]
    values = [figure["value"] for figure in figures if "value" in figure]
    met = bool(values) and all(map(bar.met, values)) and len(values) == len(seeds)
    mean = value_text(bar, statistics.fmean(values)) if values else "–"
    spread = f"{value_text(bar, min(values))} to {value_text(bar, max(values))}" if values else "–"
    verdict = "reached by every seed" if met else "not reached by every seed"
    low_high = [interval_text(bar, f) if "value" in f else str(f["reason"]) for f in figures]
    return [bar.title, *cells, mean, spread, limit_text(bar), verdict], [bar.title, *low_high]


def _parts(seeds: Sequence[Seed]) -> list[str]:
    rows = []
    for seed in seeds:
        figures = seed.report["figures"]
        gap = figures["caption_gap"].get("parts", {})
        category = figures["category"].get("parts", {})
        text = figures["text"].get("parts", {})
        rows.append(
            [
                str(seed.seed),
                loss_text(gap.get("right")),
                loss_text(gap.get("shuffled")),
                percent_text(category.get("right")),
                percent_text(category.get("blank")),
                loss_text(text.get("before")),
                loss_text(text.get("after")),
                str(figures["choice"].get("trials", "–")),
            ]
        )
    heads = ["seed", "loss, own image", "loss, shuffled", "category, image", "category, blank"]
    return _table([*heads, "text before", "text after", "choice trials"], rows)


def _times(seeds: Sequence[Seed]) -> list[str]:
    rows = []
    for seed in seeds:
        for stage in seed.report["stages"]:
            cost = seed.costs.get(stage["name"], {})
            rows.append(
                [
                    str(seed.seed),
                    stage["name"],
                    str(stage["steps"]),
                    f"{stage['tokens']:,}",
                    f"{stage['seconds']:.0f}",
                    whole_text(stage["tokens_per_second"]),
                    whole_text(cost.get("wall")),
                    whole_text(cost.get("cpu")),
                    f"{loss_text(stage['first_loss'])} → {loss_text(stage['last_loss'])}",
                ]
            )
    heads = ["seed", "stage", "steps", "useful tokens", "training s", "tokens/s"]
    return [
        *_table([*heads, "command wall s", "command CPU s", "loss"], rows),
        "",
        "Training: all steps, loader wait included. Command: with start-up, indexing, saving.",
    ]


def _rivals(rivals: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for rival in rivals:
        figures, training = rival["figures"], rival["training"]
        rows.append(
            [
                str(rival["arguments"]["seed"]),
                *(
                    value_text(bar, figures[name]["value"]) if "value" in figures[name] else "–"
                    for name, bar in BARS.items()
                ),
                f"{training['align']['seconds'] + training['lora']['seconds']:.0f}",
                f"{training['align']['samples'] + training['lora']['samples']:,}",
            ]
        )
    titles = [f"{bar.title} ({bar.unit})" for bar in BARS.values()]
    return _table(["seed", *titles, "training s", "samples"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    clean = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
        *("| " + " | ".join(row) + " |" for row in clean),
    ]


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_rivals() -> list[dict[str, Any]]:
    """Results of `benchmarks.loop` that lie in benchmarks/results."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("loop-*.json"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description="The quick start's figures over several seeds.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys for every stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cpus", type=int, default=2, help="ranks")
    parser.add_argument("--recipes", type=Path, default=RECIPES)
    parser.add_argument("--outputs", type=Path, default=OUTPUTS)
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--reuse", action="store_true", help="measure what is there, train nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_intermixed_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = shlex.join(["python", "-m", "benchmarks.quickstart", *given])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    console = Console()
    seeds = [Seed(number, options.outputs / f"seed-{number}") for number in options.seeds]
    try:
        for seed in seeds:
            seed.costs = read_costs(seed.folder)
            if not options.reuse:
                console.print(f"[bold]seed {seed.seed}")
                train(seed, options.recipes, options.cpus, options.overrides)
        for seed in seeds:
            measure(seed, options.data, console, command)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = markdown(seeds, read_rivals(), command)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "quickstart.md").write_text(text, encoding="utf-8")
    content = {"command": command, **machine.environment(), "seeds": [_plain(s) for s in seeds]}
    (options.results / "quickstart.json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
    )
    print(text)
    print(f"written to {options.results / 'quickstart.md'}")
    return 0


def _plain(seed: Seed) -> dict[str, Any]:
    """A seed without what is long: curves, recipes and answers are in its own report."""
    values = asdict(seed)
    report = values["report"]
    for name in ("examples", "data", "summary"):
        report.pop(name, None)
    for stage in report["stages"]:
        stage.pop("curve", None)
        stage.pop("recipe", None)
    return values


if __name__ == "__main__":
    sys.exit(main())
