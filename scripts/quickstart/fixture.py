"""A small data folder of the real thing, for tests: made once and kept in the cache.

    python -m scripts.quickstart.fixture        prints where it is

64 stamps, 64 pieces of furniture and 10 pages of the manual with all their shards, the held-out
split and both models. Of the Debian packages only the beginning is fetched (about 40 MB of 330).
"""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.quickstart.console import say
from scripts.quickstart.fetch import cache_folder, fetch_all
from scripts.quickstart.prepare import prepare

__all__ = ["fixture"]


def fixture() -> Path:
    """The small data folder, prepared on the first call.

    Raises:
        ValueError: what it is made of cannot be fetched.
    """
    root = cache_folder().parent / "fixture"
    prepare(root, fetch_all(small=True))
    return root


if __name__ == "__main__":
    try:
        say(str(fixture()))
    except ValueError as problem:
        say(f"error: {problem}")
        sys.exit(1)
