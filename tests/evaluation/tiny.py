"""A tiny model with a real tokenizer, assembled from folders, and saved as a stage saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mllm.models.assemble import assemble
from tests.models.conftest import SMALL_FUSION, open_gates, save_clip, save_language_model


def make_model(root: Path, fusion: str = "in_sequence", **changes: Any) -> tuple[Any, Any]:
    """A CLIP tower, average pooling to four tokens, a Llama of two layers; gates are open."""
    torch.set_num_threads(1)
    if not (root / "clip").exists():
        save_clip(root / "clip")
        save_language_model(root / "llama", **changes)
    torch.manual_seed(5)
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": root / "clip"},
            "connector": {"name": "average_pool", "visual_tokens": 4},
            "language_model": {"path": root / "llama"},
            "fusion": SMALL_FUSION[fusion],
        }
    )
    return open_gates(model), processor


def save_stage(folder: Path, model: Any, processor: Any, llama: Path, steps: int = 6) -> Path:
    """A finished stage's folder, as far as evaluation reads it."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    recipe = f"model:\n  language_model: {{path: {llama}}}\n"
    (folder / "recipe.yaml").write_text(recipe)
    run = {"plan": "abc", "steps": steps, "seed": 0, "precision": "fp32"}
    (folder / "run.json").write_text(json.dumps(run))
    lines = [
        {"step": s, "loss": 5.0 - s / 2, "tokens": 100, "learned": 40, "seconds": 0.5, "wait": 0.1}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"kind": "counts", "source": "squares", "read": 9, "used": 8, "refused": 1}
    refused = {"kind": "refused", "source": "squares", "key": "x", "reason": "<torn>"}
    ledger = f"{json.dumps(counts)}\n{json.dumps(refused)}\n"
    (folder / "ledger.jsonl").write_text(ledger)
    (folder / "FINISHED").write_text("{}")
    return folder
