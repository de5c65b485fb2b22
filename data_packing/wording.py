"""How numbers are said to people."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, what: str) -> str:
    """So many things: `counted(1, "shard")` is "1 shard", `counted(0, "shard")` "0 shards"."""
    return f"{number:,} {what if number == 1 else what.replace(' or ', 's or ') + 's'}"
