"""The report on a staged training: figures, curves, held-out answers, as JSON and as one page.

python -m mllm.evaluation.report outputs/quickstart
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mllm.evaluation import machine
from mllm.evaluation.measure import BARS, HeldOutData, Unmeasured
from mllm.evaluation.page import page
from mllm.evaluation.stages import Stage, last_finished, original_model, read_stages
from mllm.evaluation.wording import figure_text, interval_text, limit_text, value_text
from mllm.inference.quiet import quiet

__all__ = ["evaluate", "main", "write"]

DATA = Path("data/quickstart")
Advance = Callable[[str, int, int], None]


def evaluate(
    folder: str | Path,
    data: str | Path = DATA,
    seed: int = 0,
    examples: int = 16,
    by_stage: bool = True,
    device: str | None = None,
    advance: Advance | None = None,
    command: str = "",
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure the last finished stage of a run.

    Args:
        folder: holds the stages' folders.
        data: the prepared data folder with what is held out.
        seed: of everything that is drawn.
        examples: how many held-out images to show with answers.
        by_stage: also measure the caption gap of the stages before the last.
        device: as `mllm.inference.generate.load`.
        advance: told (task, done, in all).
        command: what makes the report again.

    Returns:
        What report.json holds, and the pictures of the examples as data URIs by key.

    Raises:
        ValueError: no stage is finished, or the data is not there.
    """
    started, cpu_started = time.monotonic(), machine.cpu_seconds()
    stages = read_stages(folder)
    last = last_finished(stages)
    held = HeldOutData.read(data)
    if advance:
        advance("loading the model", 0, 1)
    from mllm.evaluation.examples import ask
    from mllm.evaluation.measure import measure
    from mllm.inference.generate import Generator

    generator = Generator.from_pretrained(last.path, device)
    if advance:
        advance("loading the model", 1, 1)
    figures = measure(
        generator.model, generator.processor, held, _original(stages, device), seed, advance=advance
    )
    shown = ask(
        generator,
        held,
        examples,
        seed,
        (lambda done, total: advance("answers", done, total)) if advance else None,
    )
    gaps = {last.name: figures["caption_gap"].to_json()}
    if by_stage:
        gaps = _earlier_gaps(stages, last, held, seed, device, advance) | gaps
    report: dict[str, Any] = {
        "folder": str(folder),
        "model": str(last.path),
        "seed": seed,
        "figures": {
            name: figure.to_json()
            | ({} if isinstance(figure, Unmeasured) else _judged(name, figure))
            for name, figure in figures.items()
        },
        "gap_by_stage": gaps,
        "stages": [stage.to_json() for stage in stages],
        "examples": [one.to_json() for one in shown],
        "data": held.sources,
        "made": {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "command": command,
            "seconds": time.monotonic() - started,
            "cpu_seconds": machine.cpu_seconds() - cpu_started,
            **machine.environment(),
        },
    }
    report["summary"] = [figure_text(name, figure) for name, figure in report["figures"].items()]
    return report, {one.key: one.image for one in shown}


def write(report: dict[str, Any], pictures: dict[str, str], folder: str | Path) -> Path:
    """Write report.json and report.html, each whole or not at all; returns the page's path."""
    folder = Path(folder)
    _replace(folder / "report.html", page(report, pictures))
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"
    _replace(folder / "report.json", text)
    return folder / "report.html"


def table(report: dict[str, Any]) -> Table:
    """The figures for a terminal."""
    shown = Table(title=f"Held-out figures of {report['model']}")
    for column in ("figure", "value", "95 % interval", "bar", ""):
        shown.add_column(column, justify="left" if column == "figure" else "right")
    for name, figure in report["figures"].items():
        bar = BARS[name]
        if "value" not in figure:
            shown.add_row(bar.title, "–", "–", limit_text(bar), "not measured")
            continue
        mark = "[green]reached[/]" if figure["met"] else "[red]not reached[/]"
        value = f"{value_text(bar, figure['value'])} {bar.unit}"
        shown.add_row(bar.title, value, interval_text(bar, figure), limit_text(bar), mark)
    return shown


def _judged(name: str, figure: Any) -> dict[str, Any]:
    bar = BARS[name]
    return {"unit": bar.unit, "bar": bar.limit, "met": bar.met(figure.value)}


def _original(stages: Sequence[Stage], device: str | None) -> Callable[[], tuple[Any, Any]] | None:
    """How to load the language model that the run began with, in the precision it trained in."""
    path = original_model(stages)
    if path is None:
        return None

    def load() -> tuple[Any, Any]:
        import torch

        from mllm.inference.generate import choose_device
        from mllm.models.language import load_language_model

        precise = stages[0].run.get("precision") == "fp32"
        dtype = torch.float32 if precise else torch.bfloat16
        model, tokenizer = load_language_model(path, dtype)
        model.to(choose_device(device))  # type: ignore[arg-type]
        return model, tokenizer

    return load


def _earlier_gaps(
    stages: Sequence[Stage],
    last: Stage,
    held: HeldOutData,
    seed: int,
    device: str | None,
    advance: Advance | None,
) -> dict[str, dict[str, Any]]:
    from mllm.evaluation.measure import measure
    from mllm.inference.generate import load

    gaps = {}
    for stage in stages:
        if stage is last or not (stage.path / "config.json").is_file():
            continue

        def tell(_: str, done: int, total: int, name: str = stage.name) -> None:
            if advance:
                advance(f"caption_gap of {name}", done, total)

        model, processor = load(stage.path, device)
        only = ["caption_gap"]
        found = measure(model, processor, held, None, seed, advance=tell, only=only)
        gaps[stage.name] = found["caption_gap"].to_json()
    return gaps


@contextmanager
def progress(console: Console) -> Iterator[Advance]:
    """A bar per task on a terminal, a line per finished task elsewhere."""
    bars = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def advance(name: str, done: int, total: int) -> None:
        title = BARS[name].title if name in BARS else name
        if name not in tasks:
            tasks[name] = bars.add_task(title, total=total)
            if not console.is_terminal:
                console.print(f"{title} …")
        bars.update(tasks[name], completed=done, total=total)

    with bars:
        yield advance


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm.evaluation.report", description="Report on a staged training."
    )
    parser.add_argument("folder", type=Path, help="holds the stages' folders")
    parser.add_argument("--data", type=Path, default=DATA, help=f"default: {DATA}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=16, help="held-out images to show")
    parser.add_argument("--last-only", action="store_true", help="leave out the earlier stages")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …")
    options = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = shlex.join(["python", "-m", "mllm.evaluation.report", *given])
    quiet()
    console = Console()
    try:
        with progress(console) as advance:
            report, pictures = evaluate(
                options.folder,
                options.data,
                options.seed,
                options.examples,
                not options.last_only,
                options.device,
                advance,
                command,
            )
        path = write(report, pictures, options.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        return 130
    console.print(table(report))
    console.print(f"Report: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
