"""DeepSpeed, configured from a recipe. Always DeepSpeed, at one rank too: one path, not two."""

from __future__ import annotations

import gc
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mllm.recipe import OptimizerSection, Recipe
from mllm.recipe_train import muon_refusal
from mllm.training import eight_bit, muon, schedule
from mllm.training.groups import Group, optimizer_groups
from mllm.training.step import TrainStep

BYTES_PER_TRAINABLE = 12
"""fp32 master and two moments."""


EPSILON = 1e-8
"""Of Adam."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Placement:
    """What a run computes in ("bf16" or "fp32") and its ZeRO stage."""

    precision: str
    zero: int


def choose_precision(recipe: Recipe) -> tuple[str, str]:
    """What to compute in, and why if the recipe leaves it to us."""
    if recipe.run.precision != "auto":
        return recipe.run.precision, ""
    fast, why = bf16_is_fast()
    if fast and recipe.run.zero == 0:
        return "fp32", "zero: 0 keeps no fp32 master weights for bf16"
    return ("bf16" if fast else "fp32"), why


def choose_zero(
    recipe: Recipe, precision: str, world: int, parameters: int, trainable: int
) -> tuple[int, str]:
    """The ZeRO stage, and why if the recipe leaves it to us.

    The lowest stage whose weights, gradients and optimizer state take less than half of a rank's
    memory: each further stage saves memory and communicates more.

    Args:
        world: number of ranks.
        parameters, trainable: parameters of the model, and those that learn.

    Raises:
        ValueError: the optimizer cannot run so.
    """
    if recipe.run.zero != "auto":
        if recipe.optimizer.name == "muon" and (why := muon_refusal(precision, recipe.run.zero)):
            raise ValueError(why)
        return recipe.run.zero, ""
    if recipe.optimizer.name == "muon":
        return (1 if precision == "bf16" else 0), "under no other stage Muon is itself"
    if world == 1:
        return (1 if precision == "bf16" else 0), "one rank has nothing to share"
    memory = rank_memory(world)
    weights = (2 if precision == "bf16" else 4) * parameters
    gradients = 4 * trainable
    states = BYTES_PER_TRAINABLE * trainable / world
    for stage, need in ((1, weights + gradients + states), (2, weights + states + gradients / 2)):
        if need < 0.5 * memory:
            share = f"{need / 2**30:.1f} of {memory / 2**30:.0f} GiB a rank"
            return stage, f"weights, gradients and optimizer take about {share}"
    return 3, f"the weights would leave too little of {memory / 2**30:.0f} GiB a rank"


def rank_memory(world: int) -> int:
    """Bytes that one rank may use: its GPU, or its share of the machine's memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world)))
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // max(1, local)


def bf16_is_fast() -> tuple[bool, str]:
    """Whether bfloat16 is worth it here, and why."""
    if torch.cuda.is_available():
        good = torch.cuda.is_bf16_supported()
        return good, "the GPU has bf16" if good else "the GPU has no bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        flags = []
    for flag in ("avx512_bf16", "amx_bf16"):
        if flag in flags:
            return True, f"the processor has {flag}"
    return False, "the processor has no bf16 instructions"


def config(
    recipe: Recipe, placement: Placement, accumulation: int, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        accumulation: packs per rank and step; fixed, so every step has the same shape.
        parameters: trainable ones; no bucket is larger than all of their gradients.
    """
    bucket = max(2**16, min(50_000_000, parameters))
    zero: dict[str, Any] = {"stage": placement.zero}
    if placement.zero:
        zero |= {
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
        }
    if placement.zero in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if placement.zero == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        if not torch.cuda.is_available():
            # Weights below the threshold stay whole between steps and are then gathered one by one
            # after each: with adapters that was a quarter of a step. Prefetching gathers in one go.
            zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.clip,
        "bf16": {"enabled": placement.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": recipe.optimizer.name == "adamw_8bit",
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def accumulation_steps(packs_per_step: int, world: int) -> int:
    """Micro-steps of every rank in every step."""
    return math.ceil(packs_per_step / world)


def start(
    module: TrainStep, recipe: Recipe, placement: Placement, groups: list[Group], accumulation: int
) -> Any:
    """Wrap a TrainStep. Returns DeepSpeed's engine.

    Args:
        module: with `requires_grad` set, in the precision it computes in.
        groups: who learns how fast; the parameters' names in `module.model`.
    """
    optimizer = make_optimizer(recipe.optimizer, optimizer_groups(module.model, groups))
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    gc.freeze()  # under ZeRO-1 in bf16 it collects garbage twice for every group of parameters
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=config(recipe, placement, accumulation, trainable),
            dist_init_required=False,
        )
    finally:
        gc.unfreeze()
    engine.mllm_groups = groups
    return engine


def make_optimizer(
    section: OptimizerSection, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The recipe's optimizer for `groups.optimizer_groups`."""
    if section.name == "muon":
        return muon.optimizer(groups, section.betas, EPSILON)
    if section.name == "adamw_8bit":
        return eight_bit.optimizer(groups, section.betas, EPSILON)
    # fused: ten times faster than the default on a CPU
    return torch.optim.AdamW(groups, betas=section.betas, eps=EPSILON, fused=True)


def set_lr(engine: Any, step: int, total: int, section: OptimizerSection) -> float:
    """Set every group's rate for one step. Returns the largest, for the log.

    Args:
        step: 0-based.
        total: steps of the run.
        section: the course of the rates.
    """
    rates: list[float] = []
    for group in engine.optimizer.param_groups:
        course = schedule.factor(step, total, group["warmup"], section.schedule, section.decay)
        rates.append(group["peak_lr"] * course)
        group["lr"] = group["scale"] * rates[-1]
    return max(rates)


def update(engine: Any) -> float:
    """Update the weights, unless the step's gradient is not finite; then nothing changes.

    Call it on every rank after the last backward of a step.

    Returns:
        The norm of the whole step's gradient, before clipping; infinite when nothing changed.
    """
    if engine.zero_optimization_stage() > 0:
        # Every ZeRO stage looks for itself: it drops such a gradient and says that it is infinite.
        engine.step()
        return float(engine.get_global_grad_norm())
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
        return norm
    groups = engine.optimizer.param_groups
    engine.optimizer.param_groups = []  # DeepSpeed goes through its motions, the optimizer does not
    engine.step()
    engine.optimizer.param_groups = groups
    return math.inf
