"""Keeping libraries' own bars and notices off a person's screen."""

from __future__ import annotations

import logging
import os

__all__ = ["quiet"]

VERBOSITY = "TRANSFORMERS_VERBOSITY"


def quiet() -> None:
    """Switch off transformers' bars and the notices of packages that are not needed here.

    Processes that are started later are quiet too. `TRANSFORMERS_VERBOSITY` asks for more.
    """
    asked = os.environ.setdefault(VERBOSITY, "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if asked == "error":
        transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
