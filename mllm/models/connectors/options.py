"""Reading a connector's options."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any


def check_whole(spec: Mapping[str, Any], names: tuple[str, ...], connector: str) -> None:
    """Refuse options that are given and are not whole numbers from 1 on.

    Raises:
        ValueError: naming the option.
    """
    for name in names:
        value = spec.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(
                f"connector {connector}: {name} must be a whole number greater than 0, "
                f"got {value!r}"
            )


def check_flag(spec: Mapping[str, Any], name: str, connector: str) -> None:
    """Refuse an option that is given and is neither true nor false.

    Raises:
        ValueError: naming the option.
    """
    value = spec.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"connector {connector}: {name} must be true or false, got {value!r}")


def whole(spec: Mapping[str, Any], name: str, default: int) -> int:
    """Return the option, or its default if it is not given."""
    value = spec.get(name)
    return default if value is None else int(value)


def square_side(tokens: int, grid: tuple[int, int], connector: str) -> int:
    """Return the side of the square grid of so many tokens.

    Raises:
        ValueError: it has more tokens than the grid has cells. A narrow grid with enough of them
            will do: cells are repeated across it.
    """
    side = isqrt(tokens)
    if tokens > grid[0] * grid[1]:
        raise ValueError(
            f"connector {connector}: visual_tokens {tokens} is a {side} x {side} grid, but the "
            f"encoder gives {grid[0]} x {grid[1]} cells"
        )
    return side
