"""Folders that other programs load: every export by the name that `mllm export --to` takes.

An exporter writes a model and its processor into a new folder, or raises ValueError with the reason
why the other format cannot hold them. It changes neither.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mllm.export import transformers
from mllm.models.composites import COMPOSITES
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor

Exporter = Callable[[MultimodalModel, Processor, Path], None]

EXPORTS: dict[str, Exporter] = {
    "transformers": transformers.export,
    **{composite.name: composite.write for composite in COMPOSITES.values()},
}
"""Name → exporter: any assembly as its own code, or one of the classes of transformers."""

__all__ = ["EXPORTS", "Exporter"]
