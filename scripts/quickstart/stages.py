"""Run the three recipes of recipes/quickstart, fitted to the data that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm.recipe import load, stages
from mllm.training.launch import train_stage
from mllm.training.ranks import Ranks

__all__ = ["OUTPUTS", "RECIPES", "overrides", "train_stages"]

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
OUTPUTS = Path("outputs/quickstart")
FEWEST_STEPS = 2
REPLACEMENTS = {"stamps": "shapes", "furniture": None, "gimp": "pages"}
"""What stands in where Debian's packages are missing; None: nothing does."""


def train_stages(data: Path, share: float) -> int:
    """Train every stage that is not finished; returns 0, 130 if it was stopped, else 1.

    Args:
        data: the prepared folder.
        share: of the recipes' token budgets.

    Raises:
        ValueError: a recipe or the data is not as expected.
    """
    ranks = Ranks.choose(None, None)
    for file in stages(RECIPES):
        changed = overrides(file, data, share)
        status = train_stage(file, changed, load(file, changed), ranks)
        if status:
            return status
    return 0


def overrides(file: Path, data: Path, share: float) -> list[str]:
    """The recipe's keys to change for a part of the data, or for other data."""
    recipe = load(file)
    changed = []
    if share < 1.0 and recipe.run.tokens is not None:
        tokens = max(FEWEST_STEPS * recipe.run.tokens_per_step, round(recipe.run.tokens * share))
        changed.append(f"run.tokens={tokens}")
    sources = _sources(recipe, data)
    if sources is not None:
        changed.append(f"data.sources={json.dumps(sources)}")
    return changed


def _sources(recipe: Any, data: Path) -> list[dict[str, Any]] | None:
    """The sources of the PyPI-only set in place of the recipe's; None if nothing changes."""
    if (data / "raw" / "stamps").is_dir():
        return None
    found = []
    for source in recipe.data.sources:
        shard = Path(source.path)
        name = shard.name.removesuffix("-*.tar")
        replacement = REPLACEMENTS.get(name, name)
        if replacement is not None:
            found.append({"path": str(shard.with_name(f"{replacement}-*.tar")), "weight": 1.0})
    return found
