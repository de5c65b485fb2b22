"""What every rank runs: `deepspeed --num_gpus 8 scripts/train.py recipe.yaml [key=value ...]`.

Nothing heavy is imported at the top: loader workers import this module again when they start.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mllm.recipe import load
from mllm.training.control import Control


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one rank of one stage, and leave with its exit status."""
    parser = argparse.ArgumentParser(description="One rank of one stage; start it with deepspeed.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, default=0)
    options = parser.parse_args(arguments)
    control = Control.from_environment(int(os.environ.get("RANK", "0")), options.recipe.stem)
    control.watch()
    try:
        recipe = load(options.recipe, options.overrides)
        from mllm.training.stage import Worker, start_processes

        start_processes(control)
        Worker(recipe, control).run()
        status = 0
    except Exception as error:
        control.fail(error)
        status = 1
    control.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for the threads of a process group, broken or not


if __name__ == "__main__":
    main()
