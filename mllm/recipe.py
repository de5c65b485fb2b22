"""What a run is: one YAML file, typed, validated before anything loads.

One recipe = one stage = one run; a folder of recipes is a staged training, run in file-name order.
Unknown keys, wrong types and combinations that cannot work are refused with the file, the line,
what was expected and the nearest valid name. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from mllm.recipe_errors import validated
from mllm.recipe_parts import (
    fusion_problems,
    model_problems,
    objective_problems,
    ridge_problems,
)
from mllm.recipe_section import Number, Section, Whole
from mllm.recipe_train import (
    MODULES,
    LoraSection,
    OptimizerSection,
    TrainSection,
    TrainValue,
    optimizer_problems,
    train_problems,
)
from mllm.recipe_yaml import Path_, RecipeError, flatten, override, read

__all__ = [
    "MODULES",
    "LoraSection",
    "OptimizerSection",
    "TrainSection",
    "Parts",
    "Recipe",
    "RecipeError",
    "load",
    "load_all",
    "load_parts",
    "stages",
]


def _no_bool(value: Any) -> Any:
    """Python takes true for 1, and so would a choice of numbers."""
    if isinstance(value, bool):
        raise ValueError("expected a choice that is not true or false")
    return value


class PartSection(Section):
    """A part found in a registry; further keys are options of the part that `name` chooses."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that the schema does not know; the part's own class checks them."""
        return dict(self.model_extra or {})


class EncoderSection(PartSection):
    """The vision encoder: a family, its weights, and the family's own options.

    Beside `model.from` it may change the bounds of images of native resolution, nothing else.
    """

    name: str | None = None
    path: str | None = None


class ConnectorSection(PartSection):
    """What turns visual features into language tokens. `init: ridge` solves its last layer."""

    name: str | None = None
    visual_tokens: Whole | None = Field(default=None, gt=0)
    init: Literal["random", "ridge"] | None = None


class LanguageModelSection(Section):
    """Any causal language model of transformers: a local folder, a hub id or a .gguf file."""

    path: str


class ImagesSection(PartSection):
    """How images are cut into tiles: the rule and its options; `none` undoes a saved model's."""

    tiling: str | None = None


class FusionSection(PartSection):
    """How visual tokens reach the language model; in its sequence unless given."""

    name: str


class ModelSection(Section):
    """Either `from:` a folder that a stage saved, or the three parts of a new model."""

    from_: str | None = Field(default=None, alias="from")
    encoder: EncoderSection | None = None
    connector: ConnectorSection | None = None
    language_model: LanguageModelSection | None = None
    fusion: FusionSection | None = None
    images: ImagesSection | None = None


class SourceSection(Section):
    """Shards of one source.

    `weight` = passes over it per epoch; `cap` = the most documents that an epoch takes of it;
    `text` = which text variant; `objectives` = which of the recipe's learn from it, all of them
    unless given.
    """

    path: str
    text: str | None = Field(default=None, min_length=1)
    weight: Number = Field(default=1.0, gt=0, le=1e6)
    cap: Whole | None = Field(default=None, gt=0)
    objectives: tuple[str, ...] | None = None


class BalanceSection(Section):
    """What packs cost, for steps of like packs; nothing given: from the model's shape."""

    off: bool = False
    tokens: Number | None = Field(default=None, gt=0)
    pairs: Number | None = Field(default=None, ge=0)
    patches: Number | None = Field(default=None, ge=0)


def _balance_word(value: Any) -> Any:
    if value is False or value == "auto":
        return {"off": value is False}
    if not isinstance(value, dict | BalanceSection):
        raise ValueError("expected auto, false or {tokens: …, pairs: …, patches: …}")
    return value


class PackingSection(Section):
    """The capacities of a pack: language tokens, vision patches, documents."""

    tokens: Whole = Field(gt=1)
    patches: Whole | None = Field(default=None, gt=0)
    documents: Whole | None = Field(default=None, gt=0)
    across_documents: bool = False
    balance: Annotated[BalanceSection, BeforeValidator(_balance_word)] = BalanceSection()


class DataSection(Section):
    """What is learned from.

    `loss_weights` = what a learned token counts: 1 (token), or 1/n (sample) or 1/sqrt(n) (sqrt) of
    the n that its document has; `window` = documents that are planned together, of a larger corpus;
    `workers` = loader processes per rank; `max_refused` = the share of documents that may be
    unusable before the run stops; `allow_http` = whether a path may be an http:// URL.
    """

    sources: tuple[SourceSection, ...]
    packing: PackingSection
    window: Whole = Field(default=2**20, gt=0)
    loss_weights: Literal["token", "sample", "sqrt"] = "token"
    workers: Whole = Field(default=1, ge=0)
    max_refused: Number = Field(default=0.1, ge=0, le=1)
    allow_http: bool = False


class RunSection(Section):
    """How long, how precise, on what, and where to.

    `keep` = how many of the newest checkpoints stay; unless given two, and one when the stage is
    finished; `max_skipped` = how many steps in a row may be left out because their loss or gradient
    is not finite.
    """

    tokens: Whole | None = Field(default=None, gt=0)
    epochs: Whole | None = Field(default=None, gt=0, le=100_000)
    tokens_per_step: Whole = Field(gt=0, le=2**40)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    zero: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_no_bool)] = "auto"
    seed: Whole = Field(default=0, ge=0)
    checkpoint_every: Whole | None = Field(default=None, gt=0)
    keep: Whole | None = Field(default=None, gt=0)
    max_skipped: Whole = Field(default=3, ge=0)
    output: str | None = None


class Recipe(Section):
    """One stage. `file` is where it was read from; `run.output` is always filled in."""

    model: ModelSection
    train: dict[str, TrainValue]
    data: DataSection
    objectives: tuple[str, ...] = ("language_modeling",)
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection

    @property
    def output(self) -> Path:
        """The stage's folder."""
        assert self.run.output is not None
        return Path(self.run.output)

    @property
    def uses(self) -> tuple[tuple[int, ...], ...]:
        """[sources][objectives]: 1 where an objective learns from a source, else 0."""
        chosen = [source.objectives or self.objectives for source in self.data.sources]
        return tuple(tuple(int(name in names) for name in self.objectives) for names in chosen)

    def identity(self) -> dict[str, Any]:
        """Dotted key → value of everything that decides the result.

        Where a run is written, how often it is saved, its loader workers, its ZeRO stage and what
        it may lose or fetch are left out: they may change between two parts of one run.
        """
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for section, key in (
            ("run", "output"),
            ("run", "checkpoint_every"),
            ("run", "keep"),
            ("run", "max_skipped"),
            ("run", "zero"),
            ("data", "workers"),
            ("data", "max_refused"),
            ("data", "allow_http"),
        ):
            values[section].pop(key, None)
        return dict(flatten(values, ""))

    def hash(self) -> str:
        """Hex digest of `identity()`."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Parts(Section):
    """What a recipe says of its model and of how it learns."""

    model: ModelSection
    train: dict[str, TrainValue] = Field(default={})
    optimizer: OptimizerSection = OptimizerSection()


def load(file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, complete and check one recipe.

    Args:
        file: the YAML file; its paths are relative to the working directory.
        overrides: `dotted.key=value` assignments laid over it.

    Raises:
        RecipeError: for everything a user can get wrong, each with its place; all at once.
    """
    file = Path(file)
    source = read(file)
    override(source, overrides)
    recipe = validated(Recipe, source)
    problems = list(_impossible(recipe))
    if problems:
        raise RecipeError("\n".join(f"{source.place(path)}: {text}" for path, text in problems))
    if recipe.run.output is None:
        folder = file.resolve().parent.name
        output = str(Path("outputs") / folder / file.stem)
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"output": output})})
    return recipe


def load_parts(file: str | Path, overrides: Sequence[str] = ()) -> Parts:
    """Read and check what a recipe says of its model; a file may say nothing else.

    Args:
        file: a whole recipe, or its `model:` section alone or with `train:`.
        overrides: as for `load`.

    Raises:
        RecipeError: as `load`; of a whole recipe also for what is wrong elsewhere in it.
    """
    source = read(Path(file))
    override(source, overrides)
    if {"data", "run"} & source.values.keys():
        recipe = load(file, overrides)
        return Parts(model=recipe.model, train=recipe.train, optimizer=recipe.optimizer)
    parts = validated(Parts, source)
    problems = list(model_problems(parts.model))
    if parts.train:
        problems += train_problems(parts.train, parts.optimizer)
        problems += fusion_problems(parts.model, parts.train)
    if problems:
        raise RecipeError("\n".join(f"{source.place(path)}: {text}" for path, text in problems))
    return parts


def stages(path: str | Path) -> list[Path]:
    """The recipe files of a recipe or of a folder of recipes, in running order."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
    if not files:
        raise RecipeError(f"{path}: there is no recipe (.yaml) in this folder")
    return files


def load_all(path: str | Path, overrides: Sequence[str] = ()) -> list[tuple[Path, Recipe]]:
    """Load every stage of a recipe or folder, so that a mistake in the last is seen first.

    Raises:
        RecipeError: also when two stages would write to one folder.
    """
    loaded = [(file, load(file, overrides)) for file in stages(path)]
    seen: dict[Path, Path] = {}
    for file, recipe in loaded:
        home = recipe.output.resolve()
        if home in seen:
            raise RecipeError(f"{file}: run.output {recipe.output} is also that of {seen[home]}")
        seen[home] = file
    return loaded


def _impossible(recipe: Recipe) -> Iterable[tuple[Path_, str]]:
    """Combinations that the types allow and that cannot work."""
    yield from model_problems(recipe.model)
    yield from train_problems(recipe.train, recipe.optimizer)
    yield from fusion_problems(recipe.model, recipe.train)
    yield from ridge_problems(recipe.model, recipe.train)
    run, packing = recipe.run, recipe.data.packing
    if run.tokens is None and run.epochs is None:
        yield ("run",), "give run.tokens or run.epochs: how long should it train?"
    if run.tokens is not None and run.epochs is not None:
        yield ("run", "epochs"), "give run.tokens or run.epochs, not both"
    if run.tokens_per_step < packing.tokens:
        yield (
            ("run", "tokens_per_step"),
            f"run.tokens_per_step ({run.tokens_per_step}) is smaller than one pack "
            f"(data.packing.tokens = {packing.tokens}); make it a multiple of the pack",
        )
    elif over := run.tokens_per_step % packing.tokens:
        fewer = run.tokens_per_step - over
        yield (
            ("run", "tokens_per_step"),
            f"run.tokens_per_step ({run.tokens_per_step}) is no multiple of a pack "
            f"(data.packing.tokens = {packing.tokens}); the nearest are {fewer} and "
            f"{fewer + packing.tokens}",
        )
    if run.precision == "bf16" and run.zero == 0:
        yield (
            ("run", "zero"),
            "run.zero: 0 keeps no fp32 master weights for bf16; use zero: 1 or precision: fp32",
        )
    yield from optimizer_problems(recipe.optimizer, run.precision, run.zero)
    if not recipe.data.sources:
        yield ("data", "sources"), "data.sources is empty: give at least one {path: …}"
    yield from objective_problems(recipe.objectives, recipe.data.sources)
