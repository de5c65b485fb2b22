"""Where a stage's data and its parent are. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

from data_packing.shards import expand
from mllm.recipe import Recipe
from mllm.training.run_folder import RunFolder


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


def parent_id(recipe: Recipe) -> str | None:
    """The identity of the stage that `model.from` names, None when it names no stage.

    Raises:
        ValueError: when there is nothing at that path, or the stage is not finished.
    """
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
