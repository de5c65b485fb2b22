"""What a stage's folder tells of its training; a stage that is missing or half done says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Stage", "last_finished", "original_model", "read_stages"]

ENDS = 5
"""Steps averaged for the first and the last loss."""


@dataclass(slots=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: its folder's name.
        path: its folder.
        finished: whether its marker is there.
        steps: the lines of metrics.jsonl.
        run: run.json; {} if it has none.
        counts: by source, what became of its documents.
        refused: (source, key, reason) of documents of which nothing was used.
        recipe: recipe.yaml as text.
    """

    name: str
    path: Path
    finished: bool
    steps: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    recipe: str = ""

    def to_json(self) -> dict[str, Any]:
        """What the report keeps of it."""
        tokens = sum(step.get("tokens", 0) for step in self.steps)
        seconds = sum(step.get("seconds", 0.0) for step in self.steps)
        losses = [step["loss"] for step in self.steps if _number(step.get("loss"))]
        return {
            "name": self.name,
            "folder": str(self.path),
            "finished": self.finished,
            "steps": len(self.steps),
            "planned_steps": self.run.get("steps"),
            "tokens": tokens,
            "learned": sum(step.get("learned", 0) for step in self.steps),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            "wait_share": sum(s.get("wait", 0.0) for s in self.steps) / seconds
            if seconds
            else None,
            "first_loss": _mean(losses[:ENDS]),
            "last_loss": _mean(losses[-ENDS:]),
            "curve": self._curve(),
            "documents": self.counts,
            "refused": self.refused,
            "run": {key: value for key, value in self.run.items() if key != "identity"},
            "recipe": self.recipe,
        }

    def _curve(self) -> list[tuple[int, float]]:
        """(useful tokens so far, loss) of every step."""
        points, total = [], 0
        for step in self.steps:
            total += int(step.get("tokens", 0))
            if _number(step.get("loss")):
                points.append((total, float(step["loss"])))
        return points


def read_stages(folder: str | Path) -> list[Stage]:
    """The stages below a folder in the order of their names.

    Raises:
        ValueError: the folder is missing or no stage was ever begun in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: train first, e.g. mllm train recipes/…")
    marks = ("run.json", "metrics.jsonl", "FINISHED", "config.json")
    paths = [p for p in sorted(folder.iterdir()) if any((p / mark).is_file() for mark in marks)]
    if not paths:
        raise ValueError(f"{folder}: no stage was begun here (no run.json in any folder below)")
    return [read_stage(path) for path in paths]


def read_stage(path: Path) -> Stage:
    """One stage's folder; whatever of it cannot be read is left empty."""
    stage = Stage(path.name, path, (path / "FINISHED").is_file())
    stage.steps = [step for step in _lines(path / "metrics.jsonl") if "step" in step]
    stage.run = next(iter(_objects(_text(path / "run.json"))), {})
    stage.recipe = _text(path / "recipe.yaml")
    for record in _lines(path / "ledger.jsonl"):
        if record.get("kind") == "counts":
            source = str(record.get("source", "?"))
            stage.counts[source] = {k: v for k, v in record.items() if isinstance(v, int)}
        elif record.get("kind") == "refused":
            names = ("source", "key", "reason")
            stage.refused.append(tuple(str(record.get(name, "?")) for name in names))  # type: ignore[arg-type]
    return stage


def last_finished(stages: Sequence[Stage]) -> Stage:
    """The stage whose model is the run's result.

    Raises:
        ValueError: none is finished.
    """
    done = [stage for stage in stages if (stage.path / "config.json").is_file()]
    if not done:
        raise ValueError(
            f"{stages[0].path.parent}: no stage is finished, so there is no model to evaluate. Run "
            "the same training command again; it goes on where it stopped."
        )
    return done[-1]


def original_model(stages: Sequence[Stage]) -> str | None:
    """The language model that the first stage began with; None if its recipe does not say."""
    import yaml

    for stage in stages:
        try:
            recipe = yaml.safe_load(stage.recipe) or {}
            return str(recipe["model"]["language_model"]["path"])
        except (yaml.YAMLError, KeyError, TypeError):
            continue
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _objects(text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError:
        return []
    return [value] if isinstance(value, dict) else []


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; a torn line is left out."""
    return [record for line in _text(path).split("\n") for record in _objects(line)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
