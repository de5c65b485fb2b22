"""What the quick start says at its end."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from scripts.quickstart.console import console, say

__all__ = ["chat_command", "figures", "table"]

AVERAGED_STEPS = 5


def table(outputs: Path) -> None:
    """Print each stage's steps, tokens, speed and losses."""
    shown = Table(title="The three stages")
    for column in ("stage", "steps", "useful tokens", "tokens/s", "minutes", "loss"):
        shown.add_column(column, justify="left" if column == "stage" else "right")
    for metrics in sorted(outputs.glob("*/metrics.jsonl")):
        steps = _lines(metrics)
        if steps:
            shown.add_row(metrics.parent.name, *_row(steps))
    console.print(shown)


def figures(outputs: Path) -> None:
    """Print the figures of a report that was written before."""
    for line in json.loads((outputs / "report.json").read_text(encoding="utf-8"))["summary"]:
        say(line)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _row(steps: list[dict[str, Any]]) -> tuple[str, ...]:
    tokens = sum(step["tokens"] for step in steps)
    seconds = sum(step["seconds"] for step in steps)
    averaged = max(1, min(AVERAGED_STEPS, len(steps) // 2))
    losses = [step["loss"] for step in steps if step["loss"] is not None]  # None: skipped
    first, last = _mean(losses[:averaged]), _mean(losses[-averaged:])
    return (
        str(len(steps)),
        f"{tokens:,}",
        f"{tokens / max(seconds, 1e-9):,.0f}",
        f"{seconds / 60:.1f}",
        f"{first:.2f} → {last:.2f}",
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def chat_command(data: Path, outputs: Path) -> str:
    """A command that shows the last stage a held-out image."""
    last = max(outputs.glob("*/FINISHED")).parent
    records = json.loads((data / "heldout" / "captions.json").read_text(encoding="utf-8"))
    image = data / "heldout" / records[len(records) // 2]["image"]
    question = shlex.quote("What is this?")
    command = os.path.relpath(Path(sys.executable).with_name("mllm"))
    return f"{command} chat {last} --image {image} --question {question}"
