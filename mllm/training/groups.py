"""Which parameter learns how: the longest dotted module path of the recipe wins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mllm.recipe import OptimizerSection, TrainSection
from mllm.recipe_yaml import nearest
from mllm.training import muon
from mllm.training.layers import layer_rates


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate, a weight decay and a warm-up.

    Attributes:
        name: the recipe's key; with "/layer_3" under `layer_decay`, with "/muon_64" for matrices of
            64 columns under Muon, with "/embedding" for tables whose moments stay in fp32 where
            others are in 8 bits, and with "/no_decay" for vectors (norms and biases).
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        warmup: fraction of the run during which the rate rises.
        parameters: their names in the model, in the model's order.
        muon: what a step of Muon is multiplied with, None for AdamW.
        eight_bit: whether AdamW's moments are in 8 bits.
    """

    name: str
    lr: float
    weight_decay: float
    parameters: tuple[str, ...]
    warmup: float = 0.0
    muon: float | None = None
    eight_bit: bool = False


def longest_match(name: str, keys: Iterable[str]) -> str | None:
    """The longest of `keys` that is `name` or a dotted prefix of it, None if there is none."""
    fitting = [key for key in keys if name == key or name.startswith(key + ".")]
    return max(fitting, key=len, default=None)


def check_modules(model: nn.Module, train: Mapping[str, TrainSection]) -> None:
    """Refuse a key of `train` that is no module or parameter of the model.

    Raises:
        ValueError: with the nearest path that exists.
    """
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters()]
    known = set(names)
    for key in train:
        if key not in known:
            depth = key.count(".")
            shown = [name for name in names if name.count(".") <= depth]
            raise ValueError(f"train.{key}: the model has no such module{nearest(key, shown)}")


def freeze(model: nn.Module, train: Mapping[str, TrainSection]) -> None:
    """Set `requires_grad` of every parameter. Modules the recipe does not name are frozen.

    Raises:
        ValueError: for an unknown module, or when nothing is left to train.
    """
    check_modules(model, train)
    for name, parameter in model.named_parameters():
        key = longest_match(name, train)
        parameter.requires_grad_(key is not None and train[key].full)


def parameter_groups(
    model: nn.Module, train: Mapping[str, TrainSection], optimizer: OptimizerSection
) -> list[Group]:
    """Group the trainable parameters by the recipe's key and by how they are stepped.

    Vectors (norms, biases, magnitudes) do not decay, as is usual for AdamW.

    Raises:
        ValueError: when nothing is trainable, or a key's layers cannot be told apart.
    """
    gathered: dict[tuple[str, str], list[str]] = {}
    shared: dict[tuple[str, str], dict[str, Any]] = {}
    for key, name, end, values in _each(model, train, optimizer):
        gathered.setdefault((key, end), []).append(name)
        shared[key, end] = values
    for key, how in train.items():
        if not how.frozen and not any(key == found for found, _ in gathered):
            raise ValueError(
                f"train.{key}: nothing would learn through this key: its module has no parameters "
                "of its own (a tied head is trained as the embedding), or longer keys name them all"
            )
    if not gathered:
        raise ValueError("nothing would be trained: no parameter of the model is trainable")
    return [
        Group(name=key + end, parameters=tuple(names), **shared[key, end])
        for (key, end), names in gathered.items()
    ]


def _each(
    model: nn.Module, train: Mapping[str, TrainSection], optimizer: OptimizerSection
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Key, name, the end of its group's name and the group's values, of what is trainable."""
    eight = optimizer.name == "adamw_8bit"
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = muon.matrices(model) if optimizer.name == "muon" else {}
    layers = {
        key: layer_rates(model, key, how.layer_decay)
        for key, how in train.items()
        if how.layer_decay is not None
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = longest_match(name, train)
        assert key is not None, f"{name} is trainable and no key of the recipe covers it"
        how = train[key]
        lr = how.lr or optimizer.lr
        assert lr is not None, f"the recipe let train.{key} pass without a learning rate"
        decay = optimizer.weight_decay if how.weight_decay is None else how.weight_decay
        end, scale = "", None
        if key in layers:
            number, factor = layers[key][name]
            end, lr = f"/layer_{number}", lr * factor
        if name in matrices:
            columns, scale = matrices[name]
            end = f"{end}/muon_{columns}"
        elif dimensions(parameter) < 2:
            end, decay = f"{end}/no_decay", 0.0
        elif eight and id(parameter) in embeddings:
            end = f"{end}/embedding"
        warmup = optimizer.warmup if how.warmup is None else how.warmup
        values = {"lr": lr, "weight_decay": decay, "warmup": warmup, "muon": scale}
        values["eight_bit"] = eight and end.rpartition("/")[2] not in ("no_decay", "embedding")
        yield key, name, end, values


def optimizer_groups(model: nn.Module, groups: Iterable[Group]) -> list[dict[str, Any]]:
    """The groups as torch optimizers take them; `name`, `peak_lr`, `warmup`, `scale` beside.

    A step of Muon is `scale` times the rate, so its decay is divided by it: rate times decay is
    what it would be without.
    """
    parameters = dict(model.named_parameters())
    return [
        {
            "params": [parameters[name] for name in group.parameters],
            "lr": group.lr * (group.muon or 1.0),
            "peak_lr": group.lr,
            "scale": group.muon or 1.0,
            "muon": group.muon is not None,
            "eight_bit": group.eight_bit,
            "warmup": group.warmup,
            "weight_decay": group.weight_decay / (group.muon or 1.0),
            "name": group.name,
        }
        for group in groups
    ]


def dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions, also of a parameter that ZeRO-3 has partitioned."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
