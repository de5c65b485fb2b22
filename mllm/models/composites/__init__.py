"""Whole models of transformers to begin from, by the `model_type` of their config.json."""

from __future__ import annotations

from mllm.models.composites.base import Composite

COMPOSITES: dict[str, Composite] = {}

__all__ = ["COMPOSITES", "Composite"]
