"""What a stage's model will see, as a page: `mllm data preview`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data_packing.files import atomic
from data_packing.preview import Preview, Token, look
from data_packing.preview_page import page
from data_packing.wording import counted
from mllm.recipe import Recipe, RecipeError, load, load_all
from mllm.training import build
from mllm.training.forecast import origin


def preview(
    file: Path,
    overrides: Sequence[str],
    out: Path,
    packs: int,
    step: int,
    say: Callable[[str], None],
) -> Preview:
    """Write the page of a recipe's packs.

    Args:
        file: the recipe of one stage.
        overrides: keys of the recipe to change.
        out: the page.
        packs: how many to show.
        step: the first step to show, from 1.
        say: told what is being done.

    Raises:
        ValueError: as `mllm plan` would refuse the recipe; or the run has no such step.
    """
    recipe = load(file, overrides)
    say("loading the model")
    section = origin(recipe, _neighbours(file, recipe))
    model, processor, _ = build.model(section, recipe, torch.float32, weights=False)
    plan = build.plan(recipe, model, processor, recipe.data.workers, say, judge=False)
    say(f"reading {counted(packs, 'pack')}")
    seen = look(
        plan,
        processor.encode,
        lambda ids: spell(processor, ids),
        title=str(file),
        packs=packs,
        step=step,
    )
    with atomic(out) as page_file:
        page_file.write(page(seen).encode("utf-8", "replace"))
    return seen


def spell(processor: Any, ids: Sequence[int]) -> list[Token]:
    """Every token's own text; joined they are the decoded ids.

    A character of several tokens stands at its last one. Each is decoded behind the one before it,
    because some tokenizers drop the space of a first word.
    """
    is_special: Callable[[int], bool] = processor.template.is_special
    tokens: list[Token] = []
    start = read = 0  # where the token before begins, and where text that is not told begins
    for at, token in enumerate(ids):
        if is_special(token):
            tokens.append(Token(str(processor.decode([token])), True))
            start = read = at + 1
            continue
        before = str(processor.decode(list(ids[start:read])))
        after = str(processor.decode(list(ids[start : at + 1])))
        last = at + 1 == len(ids) or is_special(ids[at + 1])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            tokens.append(Token(""))  # the next token goes on with this character
            continue
        tokens.append(Token(after[len(before) :]))
        start, read = read, at + 1
    return tokens


def _neighbours(file: Path, recipe: Recipe) -> list[Recipe]:
    """The recipes of the same folder, where the recipe starts from a stage that has not run."""
    start = recipe.model.from_
    if start is None or Path(start).exists():
        return []
    try:
        return [other for path, other in load_all(file.parent) if path.resolve() != file.resolve()]
    except RecipeError:
        return []
