"""Keeping libraries' own bars and notices off a person's screen."""

from __future__ import annotations

import logging

__all__ = ["quiet"]


def quiet() -> None:
    """Switch off transformers' bars and the notices of packages that are not needed here."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
