"""Reading a fusion's options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def check_layers(spec: Mapping[str, Any], fusion: str) -> None:
    """Refuse a `layers` that is no list of layer numbers.

    Raises:
        ValueError: naming the option.
    """
    layers = spec.get("layers")
    if layers is None:
        return
    good = isinstance(layers, Sequence) and all(type(n) is int and n >= 0 for n in layers)
    if not good or not layers or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"fusion {fusion}: layers must be a list of different layer numbers from 0 on, in "
            f"order, got {layers!r}"
        )


def chosen_layers(layers: Iterable[int], count: int, fusion: str) -> tuple[int, ...]:
    """Return the layers as a tuple.

    Raises:
        ValueError: the language model, which has `count`, has no such layer.
    """
    chosen = tuple(layers)
    if chosen and chosen[-1] >= count:
        raise ValueError(
            f"fusion {fusion}: there is no layer {chosen[-1]}; the language model has {count} "
            f"layers, 0 to {count - 1}"
        )
    return chosen
