"""The declared parts, beside the classes that they name and the pages that list them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm import parts
from mllm.models.connectors import CONNECTORS
from mllm.models.encoders import ENCODERS
from mllm.models.fusion import FUSIONS
from mllm.models.geometry import RESIZE_RULES
from mllm.models.regions import STYLES
from mllm.models.tiles import TILINGS
from mllm.objectives import OBJECTIVES
from mllm.parts import REGISTRIES, Option, Registry
from mllm.parts.fusions import WITH_WEIGHTS
from mllm.parts.language_models import REFUSED, TESTED
from mllm.parts.listing import plain, snippet
from mllm.parts.option import SQUARE, WHOLE, chosen, problems
from mllm.recipe import load
from tests.models.families import FAMILIES
from tests.test_recipe import GOOD

DOCS = Path(__file__).resolve().parents[2] / "docs"
CLASSES: dict[str, Mapping[str, type]] = {
    "encoders": ENCODERS,
    "connectors": CONNECTORS,
    "fusions": FUSIONS,
    "tilings": TILINGS,
    "objectives": OBJECTIVES,
}


@pytest.mark.parametrize("registry", REGISTRIES, ids=[each.title for each in REGISTRIES])
def test_the_declared_parts_are_the_classes_that_there_are(registry: Registry) -> None:
    classes: Mapping[str, Any] = CLASSES[registry.title]
    assert set(classes) == {name for name, part in registry.parts.items() if part.where}
    for name, kind in classes.items():
        part = registry.parts[name]
        assert f"{kind.__module__}:{kind.__qualname__}" == f"mllm.{part.where}"
        assert getattr(kind, "OPTIONS", {}) is part.options or part.options == {}


@pytest.mark.parametrize("registry", REGISTRIES, ids=[each.title for each in REGISTRIES])
def test_a_recipe_takes_every_example(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    for name, part in registry.parts.items():
        learns = ["train.fusion={lr: 1e-3}"] if name in WITH_WEIGHTS else []
        plain_start = ["model.connector.init=random"] if registry.title == "fusions" else []
        values: Any = yaml.safe_load(snippet(registry, part))
        for key in registry.key.split("."):
            values = values[key]
        load(file, [f"{registry.key}={json.dumps(values)}", *learns, *plain_start])
        assert name in json.dumps(values)


def test_the_rules_for_squares_are_the_geometrys() -> None:
    option = parts.ENCODERS["clip"].options["resize"]
    assert option.values.words == " | ".join(RESIZE_RULES)
    assert all(map(option.values.fits, RESIZE_RULES))


def test_the_ways_to_write_regions_are_the_models() -> None:
    option = parts.IMAGES["regions"]
    assert option.values.words == " | ".join(STYLES)
    assert option.default == STYLES[0]


def test_the_page_of_encoders_says_the_same() -> None:
    rows = [row for row in (DOCS / "encoders.md").read_text().splitlines() if row.startswith("|")]
    for name, part in parts.ENCODERS.items():
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        _, _, _, layer, options, _ = row.split("|")
        assert {each.strip(" `") for each in options.split(",") if each.strip()} == (
            set(part.options) - {"resize"}
        )
        if "layer" in part.options:
            assert str(part.options["layer"].default) in layer


def test_the_page_of_language_models_says_the_same() -> None:
    lines = (DOCS / "language_models.md").read_text().splitlines()
    for kind in TESTED:
        assert f"| {', '.join(kind.families)} | {kind.why} |" in lines
    for kind in REFUSED:
        assert f"| {kind.what} | {', '.join(kind.families)} | {kind.why} |" in lines
    assert len([line for line in lines if line.startswith("| ")]) == len(TESTED) + len(REFUSED) + 4


def test_every_family_that_is_run_is_listed() -> None:
    listed = {plain(family) for kind in TESTED for family in kind.families}
    assert {plain(name) for name in FAMILIES} <= listed


def test_what_is_wrong_with_options() -> None:
    options = {
        "tokens": Option(SQUARE, "tokens"),
        "depth": Option(WHOLE, "layers", default=3),
        "hidden": Option(WHOLE, "width", otherwise="the encoder's"),
    }
    assert list(problems(options, {"tokens": 4, "hidden": None})) == []
    assert dict(problems(options, {})) == {"tokens": "tokens is missing; give a square number"}
    assert dict(problems(options, {"tokens": 10, "depth": True})) == {
        "tokens": "tokens must be a square number, got 10; the nearest are 9 and 16",
        "depth": "depth must be a whole number greater than 0, got True",
    }
    assert chosen(options, {"depth": None}, "depth") == 3
    assert chosen(options, {}, "hidden") is None
    assert [option.required for option in options.values()] == [True, False, False]
