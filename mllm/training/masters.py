"""Reading and writing fp32 master weights and Adam moments, whatever ZeRO does with them.

DeepSpeed keeps masters and moments in flat pieces that depend on the stage, the precision and the
number of ranks. This file is the only place that knows where they are. Everything outside sees one
full tensor per parameter, so that a checkpoint fits any stage and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def moments(parameter: nn.Parameter) -> tuple[str, ...]:
    """What the optimizer keeps of one parameter."""
    return MUON_MOMENTS if getattr(parameter, "use_muon", False) else MOMENTS


def named_trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters and their names, in the same order on every rank."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


@torch.no_grad()
def read(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The full fp32 master and moments of one parameter, on every rank (collective).

    Returns:
        "master" and `moments`, each with the parameter's full shape.
    """
    keys = moments(parameter)
    if engine.zero_optimization_stage() == 0:
        state = engine.optimizer.state[parameter]
        full = {"master": parameter.data} | {key: state[key] for key in keys}
    else:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None and not mapping.optim_fragment:
            _link(engine)
        full = {"master": safe_get_full_fp32_param(parameter)}
        full |= {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
    shape = full_shape(parameter)
    return {key: value.reshape(shape) for key, value in full.items()}


@torch.no_grad()
def write(engine: Any, parameter: nn.Parameter, full: dict[str, Tensor]) -> None:
    """Set master and moments of one parameter from full fp32 tensors (call on every rank).

    `prepare` must have been called before, and `refresh` must be called after the last one.
    """
    stage, keys = engine.zero_optimization_stage(), moments(parameter)
    device = parameter.device
    if stage == 0:
        state = engine.optimizer.state[parameter]
        parameter.data.copy_(full["master"])
        for key in keys:
            state[key].copy_(full[key])
    elif stage == 3:
        safe_set_local_fp32_param(parameter, _local_piece(parameter, full["master"]).to(device))
        for key in keys:
            piece = _local_piece(parameter, full[key]).to(device)
            safe_set_local_optimizer_state(parameter, piece, key)
    else:
        safe_set_full_fp32_param(parameter, full["master"].to(device))
        for key in keys:
            safe_set_full_optimizer_state(parameter, full[key].to(device), key)


@torch.no_grad()
def prepare(engine: Any, step: int) -> None:
    """Create the optimizer's state, which torch creates only in its first step.

    Args:
        step: how many steps the state has seen (Adam corrects its bias by it).
    """
    optimizer = _torch_optimizer(engine)
    for piece, group in _optimized(engine):
        keys = MUON_MOMENTS if group.get("use_muon") else MOMENTS
        state: dict[str, Any] = {
            key: torch.zeros_like(piece, memory_format=torch.preserve_format) for key in keys
        }
        if "use_muon" not in group:
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=piece.device)
        elif not group["use_muon"]:
            state["step"] = step
        optimizer.state[piece] = state
    if engine.zero_optimization_stage() in (1, 2):
        _link(engine)


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Copy the masters into the weights that the model computes with."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


@torch.no_grad()
def full_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and full weight of every parameter, one after the other (collective).

    The weights are those the model computes with; a yielded tensor is valid until the next one.
    """
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data
        else:
            yield name, parameter.data


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO-3 keeps only a piece of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _link(engine: Any) -> None:
    """Let parameters find their moments. DeepSpeed links them after the first group's first step,
    when the other groups have none yet, and never again."""
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _local_piece(parameter: Any, full: Tensor) -> Tensor:
    """This rank's piece of a full tensor, padded as ZeRO-3 pads it."""
    size = parameter.ds_tensor.ds_numel
    flat = full.flatten()
    start = min(size * dist.get_rank(), flat.numel())
    stop = min(start + size, flat.numel())
    piece = flat.new_zeros(size)
    piece[: stop - start] = flat[start:stop]
    return piece


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def _optimized(engine: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """What is stepped, the parameters themselves or this rank's flat fp32 pieces, and its group."""
    optimizer = engine.optimizer
    groups = optimizer.param_groups
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3, maybe many of one group
        return [(piece, groups[0]) for piece in optimizer.fp32_partitioned_groups_flat]
    for attribute in (
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # ZeRO-1 with bf16 weights and fp32 gradients
    ):
        if hasattr(optimizer, attribute):
            return list(zip(getattr(optimizer, attribute), groups, strict=True))
    return [(p, group) for group in groups for p in group["params"]]
