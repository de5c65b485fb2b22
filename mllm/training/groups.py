"""Which parameter learns how: the longest dotted module path of the recipe wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mllm.recipe import TrainSection
from mllm.recipe_yaml import nearest


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate and a weight decay.

    Attributes:
        name: the recipe's key, with "/no_decay" for vectors (norms and biases).
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        parameters: their names in the model, in the model's order.
    """

    name: str
    lr: float
    weight_decay: float
    parameters: tuple[str, ...]


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
        how = train[key] if key is not None else None
        parameter.requires_grad_(how is not None and not how.frozen and how.lora is None)


def parameter_groups(
    model: nn.Module,
    train: Mapping[str, TrainSection],
    default_lr: float | None,
    weight_decay: float,
) -> list[Group]:
    """Group the trainable parameters by the recipe's key and by whether they decay.

    Vectors (norms, biases) do not decay, as is usual for AdamW.

    Raises:
        ValueError: when nothing is trainable.
    """
    gathered: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = longest_match(name, train)
        assert key is not None, f"{name} is trainable and no key of the recipe covers it"
        gathered.setdefault((key, dimensions(parameter) > 1), []).append(name)
    for key, how in train.items():
        if not how.frozen and not any(key == found for found, _ in gathered):
            raise ValueError(
                f"train.{key}: nothing would learn through this key: its module has no parameters "
                "of its own (a tied head is trained as the embedding), or longer keys name them all"
            )
    if not gathered:
        raise ValueError("nothing would be trained: no parameter of the model is trainable")
    groups = []
    for (key, decays), names in gathered.items():
        lr = train[key].lr or default_lr
        assert lr is not None, f"the recipe let train.{key} pass without a learning rate"
        groups.append(
            Group(
                name=key if decays else f"{key}/no_decay",
                lr=lr,
                weight_decay=weight_decay if decays else 0.0,
                parameters=tuple(names),
            )
        )
    return groups


def optimizer_groups(model: nn.Module, groups: Iterable[Group]) -> list[dict[str, Any]]:
    """The groups as torch optimizers take them, with `name` and `peak_lr` beside."""
    parameters = dict(model.named_parameters())
    return [
        {
            "params": [parameters[name] for name in group.parameters],
            "lr": group.lr,
            "peak_lr": group.lr,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in groups
    ]


def dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions, also of a parameter that ZeRO-3 has partitioned."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
