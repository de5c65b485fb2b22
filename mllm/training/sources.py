"""Where a stage's data and its parent are. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from data_packing.shards import expand
from mllm.models.errors import check_folder, check_hub, check_language_model
from mllm.recipe import EncoderSection, ModelSection, Recipe
from mllm.training.run_folder import RunFolder


def shards(recipe: Recipe) -> list[list[Path]]:
    """The shards of every source.

    Raises:
        ValueError: when a source's pattern matches nothing.
    """
    found = []
    for i, source in enumerate(recipe.data.sources):
        try:
            found.append(expand(source.path, recipe.data.allow_http))
        except (ValueError, OSError) as error:
            raise ValueError(f"data.sources.{i}.path: {error}") from None
    return found


def parent_id(recipe: Recipe) -> str | None:
    """The identity of the stage or assembled model that `model.from` names, None for another model.

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
    return (folder.assembled() or {}).get("weights")


def check_paths(recipes: Sequence[Recipe]) -> None:
    """Refuse models and data that are not there, before anything is loaded.

    Raises:
        ValueError: as `check_models` and `shards`.
    """
    check_models(recipes)
    for recipe in recipes:
        shards(recipe)


def _encoder_paths(encoder: EncoderSection | None) -> dict[str, str | None]:
    """Key → path of the encoder, or of the parts of a composed one."""
    if encoder is None:
        return {}
    parts = {
        f"model.encoder.{name}.path": section.get("path")
        for name, section in encoder.options.items()
        if isinstance(section, Mapping)
    }
    return {"model.encoder.path": encoder.path, **parts}


def check_models(recipes: Sequence[Recipe]) -> None:
    """Refuse paths of models that are no folder of one, before a worker starts.

    What an earlier stage of the same training will write need not be there yet.

    Raises:
        ValueError: no such folder, or no config.json in it; with the recipe's key.
    """
    written: set[Path] = set()
    for recipe in recipes:
        check_model(recipe.model, written)
        written.add(recipe.output.resolve())


def check_model(model: ModelSection, written: Collection[Path] = ()) -> None:
    """Refuse a model section whose paths are no folders of models, or `written` before it is read.

    Raises:
        ValueError: as `check_models`.
    """
    language = model.language_model
    named = {
        "model.from": model.from_,
        **_encoder_paths(model.encoder),
        "model.connector.path": model.connector.options.get("path") if model.connector else None,
        "model.language_model.path": language.path if language else None,
    }
    for key, path in named.items():
        if path is not None and Path(path).resolve() not in written:
            check = check_language_model if "language_model" in key else check_folder
            check(path, key)
            check_hub(path, key)
