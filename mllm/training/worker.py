"""What every rank runs: `deepspeed --num_gpus 8 scripts/train.py recipe.yaml [key=value ...]`.

torchrun and srun start it as well (processes.py); of a folder every stage is trained in its turn.
Nothing heavy is imported at the top: loader workers import this module again when they start.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mllm.recipe import load_all
from mllm.training.control import Control
from mllm.training.processes import place
from mllm.training.progress import complain
from mllm.training.sources import check_models

STOPPED = 130
"""The exit status of a training that was asked to stop and saved."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one rank of a stage, or of all stages of a folder, and leave with its exit status."""
    parser = argparse.ArgumentParser(
        description="One rank of a training; start it with deepspeed, torchrun or srun."
    )
    parser.add_argument("recipe", type=Path, help="a recipe, or a folder of recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, default=0, help="DeepSpeed's launcher gives it")
    parser.add_argument("--control", type=Path, help="how mllm train talks to it")
    options = parser.parse_args(arguments)
    try:
        rank = place(os.environ)
    except ValueError as error:
        complain(str(error))
        raise SystemExit(2) from None
    control = Control.from_environment(rank, options.control)
    control.watch()
    try:
        status = run(options.recipe, options.overrides, control)
    except Exception as error:
        control.fail(error)
        status = 1
    control.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for the threads of a process group, broken or not


def run(path: Path, overrides: Sequence[str], control: Control) -> int:
    """Train what is not finished, in the order of the files. Returns the exit status."""
    stages = load_all(path, overrides)
    check_models([recipe for _, recipe in stages])
    control.title(stages[0][0].stem)
    from mllm.training.stage import Worker, start_processes

    start_processes(control)
    for file, recipe in stages:
        control.title(file.stem)
        if not Worker(recipe, control).run():
            return 0 if control.heard else STOPPED
    return 0


if __name__ == "__main__":
    main()
