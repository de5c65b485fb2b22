"""Muon for the matrices of hidden layers (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

A matrix is stepped along its momentum with all singular values made about one. DeepSpeed's own
class is used, because under ZeRO-1 only it makes matrices whole again before it does that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

MOMENTUM = 0.95
KEPT = ("momentum_buffer",)
RMS = 0.2
"""Root mean square of AdamW's usual step. Muon's is brought to it, so that one rate and one decay
serve matrices and vectors (Liu et al. 2025, arXiv 2502.16982, equation 4)."""


def matrices(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Weights of linear layers but adapters and heads: columns, and what their step is scaled by.

    DeepSpeed multiplies the step of a matrix of r rows and c columns by sqrt(max(1, r/c)); wanted
    is 0.2 sqrt(max(r, c)); their quotient is 0.2 sqrt(c).
    """
    heads = {id(weight) for module in model.modules() for weight in _embeddings(module)}
    found: dict[str, tuple[int, float]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or ".lora_" in f".{name}":
            continue
        weight = module.weight
        if weight.ndim == 2 and weight.is_floating_point() and id(weight) not in heads:
            found[f"{name}.weight"] = (weight.shape[1], RMS * math.sqrt(weight.shape[1]))
    return found


def _embeddings(module: nn.Module) -> list[Any]:
    """Weights of embeddings and of a language model's head."""
    if isinstance(module, nn.Embedding):
        return [module.weight]
    ask = getattr(module, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return [head.weight] if isinstance(head, nn.Module) and hasattr(head, "weight") else []


def optimizer(
    groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Muon for the groups with a scale, AdamW for the others."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # to compile one shape takes ten seconds there
    for group in groups:
        group["use_muon"] = group["muon"]
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
            if group["use_muon"]:
                parameter.kept = KEPT
        if group["use_muon"]:
            group |= {"momentum": MOMENTUM, "ns_method": "standard"}
        else:
            group |= {"betas": betas, "eps": eps}
    made: torch.optim.Optimizer = MuonWithAuxAdam(groups)
    return made
