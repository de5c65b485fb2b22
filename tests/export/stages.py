"""What a stage with adapters leaves, without training it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mllm.recipe import TrainSection
from mllm.training import lora, quantised
from mllm.training.groups import longest_match
from tests.models.conftest import Parts


def adapted(kind: str = "lora", **values: Any) -> TrainSection:
    """How a module learns that gets adapters of this kind."""
    return TrainSection.model_validate({"lr": 1.0, kind: {"rank": 2, "alpha": 6, **values}})


def save_stage(parts: Parts, folder: Path, train: Mapping[str, TrainSection] | None = None) -> Path:
    """Save the model with random adapters merged, and each key's adapters beside it.

    Args:
        parts: model and processor; the model becomes the merged one.
        folder: where.
        train: of the recipe; LoRA on the language model unless given.
    """
    model, processor = parts
    train = train or {"language_model": adapted()}
    tuned = copy.deepcopy(model).requires_grad_(False)
    configs = lora.adapt(tuned, train, seed=1)
    for name, weight in tuned.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05)
    weights = {n: w for n, w in tuned.state_dict().items() if not quantised.is_own(n)}
    for name, parameter in tuned.named_parameters():
        weights[name] = quantised.plain(parameter, parameter.detach())
    model.load_state_dict(lora.merged(weights, tuned))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for key, config in configs.items():
        mine = {n: w for n, w in weights.items() if longest_match(n, train) == key}
        lora.save(mine, key, config, "", folder / lora.folder_name(key))
    return folder
