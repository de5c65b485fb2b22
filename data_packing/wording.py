"""How numbers are said to people."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["counted", "some"]


def counted(number: int, what: str) -> str:
    """So many things: `counted(1, "shard")` is "1 shard", `counted(0, "shard")` "0 shards"."""
    return f"{number:,} {what if number == 1 else what.replace(' or ', 's or ') + 's'}"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many: `some(["a", "b", "c"], 2)` is "a, b and 1 more"."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
