"""What a recipe may say about how its modules learn, checked without importing torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mllm.recipe_section import Number, Section, Whole
from mllm.recipe_yaml import Path_, nearest

MODULES = ("encoder", "connector", "language_model", "fusion")
"""What `train:` may name."""

ADAPTERS = ("lora", "dora", "qlora")
"""The kinds of adapters."""

MUON = {("fp32", 0), ("bf16", 1)}
"""(precision, ZeRO stage) under which Muon sees whole matrices and clips gradients, not updates."""


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). Scale is alpha / rank."""

    rank: Whole = Field(gt=0)
    alpha: Number | None = Field(default=None, gt=0)
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None


class TrainSection(Section):
    """How one module learns: not at all, all of it, or through adapters.

    `dora` = adapters and a magnitude (Liu et al. 2024, arXiv 2402.09353); `qlora` = adapters over
    weights in 4 bits (Dettmers et al. 2023, arXiv 2305.14314); `weight_decay` and `warmup` in place
    of the optimizer's; `layer_decay` = what each layer's rate is of that of the layer above it.
    """

    frozen: bool = False
    lr: Number | None = Field(default=None, gt=0)
    weight_decay: Number | None = Field(default=None, ge=0)
    warmup: Number | None = Field(default=None, ge=0, lt=1)
    layer_decay: Number | None = Field(default=None, gt=0, le=1)
    lora: LoraSection | None = None
    dora: LoraSection | None = None
    qlora: LoraSection | None = None

    @property
    def adapters(self) -> LoraSection | None:
        """The adapters, of whichever kind."""
        return self.lora or self.dora or self.qlora

    @property
    def full(self) -> bool:
        """Whether the module's own weights learn."""
        return not self.frozen and self.adapters is None


def _frozen_word(value: Any) -> Any:
    if value == "frozen":
        return {"frozen": True}
    if not isinstance(value, dict | TrainSection):
        raise ValueError("expected frozen or {lr: …, lora: {…}}")
    return value


TrainValue = Annotated[TrainSection, BeforeValidator(_frozen_word)]


class OptimizerSection(Section):
    """The optimizer and the course of its learning rate.

    `warmup` is a fraction of the run, and so is `decay`, the fall at the end of schedule wsd.
    """

    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    lr: Number | None = Field(default=None, gt=0)
    betas: tuple[Number, Number] = (0.9, 0.95)
    weight_decay: Number = Field(default=0.0, ge=0)
    warmup: Number = Field(default=0.0, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay: Number | None = Field(default=None, gt=0, le=1)
    clip: Number = Field(default=1.0, ge=0)


def train_problems(
    train: Mapping[str, TrainSection], optimizer: OptimizerSection
) -> Iterable[tuple[Path_, str]]:
    """What is wrong with the modules and how they learn: (path, message)."""
    for name, how in train.items():
        path: Path_ = ("train", name)
        root = name.split(".")[0]
        if root not in MODULES:
            yield path, f"train: unknown module {name!r}{nearest(root, MODULES)}"
        elif how.frozen:
            yield from _frozen(path, name, how)
        else:
            yield from _learning(path, name, how, optimizer)
    if all(how.frozen for how in train.values()):
        yield ("train",), "nothing would be trained: give at least one module a learning rate"


def _frozen(path: Path_, name: str, how: TrainSection) -> Iterable[tuple[Path_, str]]:
    given = [key for key, value in how.model_dump().items() if key != "frozen" and value]
    if how.lr:
        yield path, f"train.{name} is frozen and has a learning rate; choose one"
    elif given:
        yield (*path, given[0]), f"train.{name} is frozen and has {given[0]}; choose one"


def _learning(
    path: Path_, name: str, how: TrainSection, optimizer: OptimizerSection
) -> Iterable[tuple[Path_, str]]:
    if how.lr is None and optimizer.lr is None:
        yield path, f"train.{name} has no learning rate; give train.{name}.lr or optimizer.lr"
    kinds = [kind for kind in ADAPTERS if getattr(how, kind) is not None]
    for kind in kinds[1:]:
        yield (*path, kind), f"train.{name} has {kinds[0]} and {kind}; choose one"
    warmup = optimizer.warmup if how.warmup is None else how.warmup
    if optimizer.schedule == "wsd" and warmup + (optimizer.decay or WSD_DECAY) > 1:
        where = path if how.warmup is not None else ("optimizer", "warmup")
        yield where, f"train.{name}: warmup and optimizer.decay are together more than the run"


WSD_DECAY = 0.1
"""How much of a run falls under wsd, unless told: a tenth is enough (arXiv 2404.06395, 4.3)."""


def optimizer_problems(
    optimizer: OptimizerSection,
    precision: str,
    zero: int | str,
) -> Iterable[tuple[Path_, str]]:
    """What cannot be optimized so: (path, message).

    Args:
        precision, zero: `run.precision` and `run.zero`, either of which may be "auto".
    """
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield ("optimizer", "betas"), "optimizer.betas must lie in [0, 1)"
    if optimizer.decay is not None and optimizer.schedule != "wsd":
        yield (
            ("optimizer", "decay"),
            f"optimizer.decay is how much of a run falls under schedule wsd; {optimizer.schedule} "
            "has no such part",
        )
    if optimizer.name == "muon" and isinstance(zero, int):
        kinds = [precision] if precision != "auto" else ["bf16", "fp32"]
        reasons = [muon_refusal(kind, zero) for kind in kinds]
        if all(reasons):
            yield ("run", "zero"), str(reasons[0])


def muon_refusal(precision: str, zero: int) -> str | None:
    """Why Muon cannot run so, None if it can."""
    if (precision, zero) in MUON:
        return None
    if zero == 0:
        return None  # bf16 without masters is refused for every optimizer
    return (
        f"optimizer.name: muon under run.zero: {zero} in {precision}: DeepSpeed clips Muon's steps "
        "there instead of the gradients, so it would be another optimizer than on one rank; use "
        "zero: 0 with precision: fp32 or zero: 1 with bf16"
    )
