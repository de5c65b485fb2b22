"""Reading and writing fp32 master weights and Adam moments, whatever ZeRO does with them.

DeepSpeed keeps masters and moments in flat pieces that depend on the stage, the precision and the
number of ranks. This file is the only place that knows where they are. Everything outside sees one
full tensor per parameter, so that a checkpoint fits any stage and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

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

from mllm.training import eight_bit, muon

MOMENTS = ("exp_avg", "exp_avg_sq")


def kept(parameter: nn.Parameter) -> tuple[str, ...]:
    """What the optimizer keeps of one parameter, in tensors of its shape."""
    names: tuple[str, ...] = getattr(parameter, "kept", MOMENTS)
    return names


def named_trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters and their names, in the same order on every rank."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


@torch.no_grad()
def master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The full fp32 master of one parameter, on every rank (collective)."""
    if engine.zero_optimization_stage() == 0:
        return parameter.data
    return cast(Tensor, safe_get_full_fp32_param(parameter)).reshape(full_shape(parameter))


@torch.no_grad()
def read(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The full fp32 master and moments of one parameter, on every rank (collective).

    Call it inside `readable`.

    Returns:
        "master" and what is `kept`, each with the parameter's full shape; fp32, or bytes.
    """
    keys = kept(parameter)
    if engine.zero_optimization_stage() == 0:
        state = engine.optimizer.state[parameter]
        full = {"master": parameter.data} | {key: state[key] for key in keys}
    else:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None and not mapping.optim_fragment:
            _link(engine)
        full = {"master": safe_get_full_fp32_param(parameter)}
        full |= {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
    if eight_bit.SCALES[0] in keys:
        full |= {key: full[key].byte() for key in eight_bit.CODES}
    shape = full_shape(parameter)
    return {key: value.reshape(shape) for key, value in full.items()}


@torch.no_grad()
def write(engine: Any, parameter: nn.Parameter, full: dict[str, Tensor]) -> None:
    """Set master and moments of one parameter from full fp32 tensors (call on every rank).

    `prepare` must have been called before, and `refresh` must be called after the last one.
    """
    stage, keys = engine.zero_optimization_stage(), kept(parameter)
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
    optimizer: Any = _torch_optimizer(engine)
    for piece, group in _optimized(engine):
        if "eight_bit" in group and hasattr(optimizer, "fill_qmap"):
            optimizer.state[piece] = eight_bit.empty(optimizer, piece, group, step)
        elif group.get("use_muon"):
            optimizer.state[piece] = {muon.KEPT[0]: torch.zeros_like(piece)}
        else:
            count: Any = torch.tensor(float(step), dtype=torch.float32, device=piece.device)
            optimizer.state[piece] = {"step": step if "use_muon" in group else count} | {
                key: torch.zeros_like(piece, memory_format=torch.preserve_format) for key in MOMENTS
            }
    if engine.zero_optimization_stage() in (1, 2):
        _link(engine)


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Copy the masters into the weights that the model computes with, and pack what is packed."""
    pack(engine)
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


@contextmanager
def readable(engine: Any) -> Iterator[None]:
    """While it lasts, `read` finds all that is kept: of moments in 8 bits the scales too."""
    optimizer = _torch_optimizer(engine)
    states = [optimizer.state[piece] for piece, group in _optimized(engine) if _packs(group)]
    for state in states:
        eight_bit.expand(state)
    if states and engine.zero_optimization_stage() in (1, 2):
        _link(engine)
    try:
        yield
    finally:
        for state in states:
            for key in eight_bit.SCALES:
                state.pop(key, None)
        if states and engine.zero_optimization_stage() in (1, 2):
            _link(engine)


def pack(engine: Any) -> None:
    """Give moments in 8 bits the form that the optimizer steps; after `prepare` and all `write`."""
    optimizer = _torch_optimizer(engine)
    states = [optimizer.state[piece] for piece, group in _optimized(engine) if _packs(group)]
    for state in states:
        eight_bit.collapse(state)
    if states and engine.zero_optimization_stage() in (1, 2):
        _link(engine)


def _packs(group: dict[str, Any]) -> bool:
    return bool(group.get("eight_bit"))


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
        of = optimizer.sub_group_to_group_id
        pieces = optimizer.fp32_partitioned_groups_flat
        return [(piece, groups[of[i]]) for i, piece in enumerate(pieces)]
    for attribute in (
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # ZeRO-1 with bf16 weights and fp32 gradients
    ):
        if hasattr(optimizer, attribute):
            return list(zip(getattr(optimizer, attribute), groups, strict=True))
    return [(p, group) for group in groups for p in group["params"]]
