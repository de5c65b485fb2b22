"""Several stages in one launch, for tests: a launch costs fifteen seconds, a tiny stage one.

deepspeed --num_gpus 2 tests/training/run_many.py recipe.yaml other.yaml@3 …

`@3` asks that run to stop after its third step, as Ctrl-C would; `@full` leaves the second rank
no room for a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from mllm.recipe import load
from mllm.training.control import Control
from mllm.training.run_folder import NoSpace, RunFolder, read_lines
from mllm.training.stage import Worker, start_processes
from tests.training import second


class StopAfter(Control):
    """A control whose stop is asked for once the run has made so many steps."""

    def __init__(self, rank: int, folder: RunFolder, steps: int) -> None:
        super().__init__(rank, None)
        self.metrics, self.steps = folder.metrics, steps

    @property
    def stop_requested(self) -> bool:
        """Whether the next step is the last one."""
        return len(read_lines(self.metrics)) >= self.steps - 1


class Watched(Worker):
    """A worker that writes down what the optimizer's groups are when it ends."""

    def _train(self, deepspeed_engine: Any, *arguments: Any) -> bool:
        ended = super()._train(deepspeed_engine, *arguments)
        if dist.get_rank() == 0:
            groups = [
                {name: value for name, value in group.items() if name != "params"}
                for group in deepspeed_engine.optimizer.param_groups
            ]
            Path(f"{self.recipe.output}.groups").write_text(json.dumps(groups))
        return ended


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Files may not grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def main() -> None:
    """Run every stage, in order; every rank writes the message of a refused one.

    It lies in <output>.error-<rank>.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("recipes", nargs="+")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    start_processes(Control(rank, None))
    second.register()
    for argument in options.recipes:
        file, _, steps = argument.partition("@")
        recipe = load(file)
        control = Control(rank, None)
        if steps.isdigit():
            control = StopAfter(rank, RunFolder(recipe.output), int(steps))
        try:
            with room(1000) if steps == "full" and rank == 1 else contextlib.nullcontext():
                Watched(recipe, control).run()
        except (ValueError, NoSpace) as error:
            traceback.print_exc()
            Path(f"{recipe.output}.error-{rank}").write_text(f"{type(error).__name__}: {error}")
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
