"""The objectives that a recipe can name."""

from __future__ import annotations

from mllm.parts.option import Part

OBJECTIVES: dict[str, Part] = {
    "language_modeling": Part(
        "cross-entropy of every learned token",
        "objectives.language_modeling:LanguageModeling",
        "[language_modeling]",
    ),
}
"""Name → what it is; the order of `mllm models`."""
