"""What a stage leaves behind: a model that loads without being told how it was made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import Tensor

from data_packing.files import sync_folder
from mllm.recipe import Recipe
from mllm.training import lora, masters, quantised
from mllm.training.checkpoint_index import homes
from mllm.training.groups import longest_match
from mllm.training.run_folder import RunFolder, full_disk_is_clear, settle, write_atomically


def finish(
    engine: Any,
    processor: Any,
    recipe: Recipe,
    folder: RunFolder,
    adapters: Mapping[str, LoraConfig],
    facts: dict[str, Any],
) -> None:
    """Gather the model, merge adapters, write everything, then the marker (collective).

    Args:
        adapters: what `lora.adapt` returned.
        facts: what the marker says, beside the identity of the weights.

    Raises:
        NoSpace: on rank 0; nothing in the folder passes for finished.
    """
    weights = gather(engine)
    if dist.get_rank() == 0:
        model = engine.module.model
        draft = folder.path / ".model"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            with full_disk_is_clear(draft):
                write_model(model, processor, recipe, weights, adapters, draft)
                _move(draft, folder.path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        facts = facts | {"weights": weights_id(folder.path)}
        write_atomically(folder.marker, json.dumps(facts, indent=2) + "\n")
        for old in homes(folder.state)[: -(recipe.run.keep or 1)]:
            shutil.rmtree(old)
    dist.barrier()


@torch.no_grad()
def gather(engine: Any) -> dict[str, Tensor]:
    """All weights of the model on rank 0's CPU, {} on the other ranks (collective).

    Trained ones are the fp32 masters, frozen ones and buffers are as the model has them; what it
    has in 4 bits is what it computes with.
    """
    keep = dist.get_rank() == 0
    model = engine.module.model
    result: dict[str, Tensor] = {}
    known = dict(model.named_parameters())
    for name, weight in masters.full_weights(model):
        parameter = known[name]
        full = masters.master(engine, parameter) if parameter.requires_grad else weight
        if keep:
            result[name] = quantised.plain(parameter, full).detach().cpu().clone()
    if keep:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, tensor in model.state_dict().items():
            if name not in parameters and not quantised.is_own(name):
                result[name] = tensor.detach().cpu().clone()
    return result


def write_model(
    model: Any,
    processor: Any,
    recipe: Recipe,
    weights: dict[str, Tensor],
    adapters: Mapping[str, LoraConfig],
    folder: Path,
) -> None:
    """Write model, processor and adapters into a new folder."""
    folder.mkdir(parents=True)
    plain = lora.merged(weights, model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    plain = {n: (w.to(dtype) if w.is_floating_point() else w) for n, w in plain.items()}
    model.save_pretrained(folder, state_dict=plain)
    processor.save_pretrained(folder)
    for key, config in adapters.items():
        mine = {n: w for n, w in weights.items() if longest_match(n, recipe.train) == key}
        part = getattr(recipe.model, key.split(".")[0])
        base = recipe.model.from_ or getattr(part, "path", None) or ""
        lora.save(mine, key, config, base, folder / lora.folder_name(key))
    settle(folder)


def weights_id(folder: Path) -> str:
    """Hash of the weights in a folder: which version of a stage another one started from."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _move(draft: Path, home: Path) -> None:
    for path in sorted(draft.iterdir()):
        target = home / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    sync_folder(home)
