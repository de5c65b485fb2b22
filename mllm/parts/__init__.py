"""What a recipe can name, declared without torch: the one place for names, options and defaults.

Recipes are checked against these tables before anything is loaded, the classes take their options
and defaults from them, and `mllm models` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mllm.parts.connectors import CONNECTORS
from mllm.parts.encoders import ENCODERS
from mllm.parts.fusions import FUSIONS
from mllm.parts.objectives import OBJECTIVES
from mllm.parts.option import Option, Part
from mllm.parts.published import PUBLISHED
from mllm.parts.tilings import IMAGES, MOST_TILES, TILINGS

__all__ = [
    "CONNECTORS",
    "ENCODERS",
    "FUSIONS",
    "IMAGES",
    "MOST_TILES",
    "OBJECTIVES",
    "PUBLISHED",
    "REGISTRIES",
    "TILINGS",
    "WHOLE_MODELS",
    "Option",
    "Part",
    "Registry",
]


@dataclass(frozen=True, slots=True)
class Registry:
    """Parts of one kind.

    Attributes:
        title: for people.
        key: where a recipe names them.
        parts: by name.
        note: what holds for all of them.
    """

    title: str
    key: str
    parts: Mapping[str, Part]
    note: str = ""


PATH = "the folder or hub id of their weights"
INIT = "random, or ridge (the last layer in closed form)"

REGISTRIES = (
    Registry("encoders", "model.encoder", ENCODERS, f"all take path, {PATH}"),
    Registry("connectors", "model.connector", CONNECTORS, f"all take init: {INIT}"),
    Registry("fusions", "model.fusion", FUSIONS, "how visual tokens reach the language model:"),
    Registry("tilings", "model.images", TILINGS, "an image as several views; with one or without:"),
    Registry("objectives", "objectives", OBJECTIVES),
)

WHOLE_MODELS = Registry(
    "published models", "model.from", PUBLISHED, "a folder or hub id, in place of all parts:"
)
"""Not parts: a recipe names a folder, and its config.json says which of them it is."""
