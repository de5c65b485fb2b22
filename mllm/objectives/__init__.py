"""Losses. An objective is found through `OBJECTIVES`, by the name that a recipe uses."""

from __future__ import annotations

from mllm.objectives.base import Objective
from mllm.objectives.language_modeling import LanguageModeling

OBJECTIVES: dict[str, type[Objective]] = {"language_modeling": LanguageModeling}

__all__ = ["OBJECTIVES", "LanguageModeling", "Objective"]
