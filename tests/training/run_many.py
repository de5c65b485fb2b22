"""Several stages in one launch, for tests: a launch costs fifteen seconds, a tiny stage one.

deepspeed --num_gpus 2 tests/training/run_many.py recipe.yaml other.yaml@3 …

`@3` asks that run to stop after its third step, as Ctrl-C would.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from mllm.recipe import load
from mllm.training.control import Control
from mllm.training.run_folder import RunFolder, read_lines
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


def main() -> None:
    """Run every stage, in order; a refused one writes its message to <output>.error."""
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
        if steps:
            control = StopAfter(rank, RunFolder(recipe.output), int(steps))
        try:
            Worker(recipe, control).run()
        except ValueError as error:
            traceback.print_exc()
            if rank == 0:
                Path(f"{recipe.output}.error").write_text(str(error))
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
