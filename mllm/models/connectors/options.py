"""A square number of visual tokens, and the grid of cells that they are pooled from."""

from __future__ import annotations

from math import isqrt


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
