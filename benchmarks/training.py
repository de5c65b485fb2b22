"""Useful tokens per second: our packed step beside Hugging Face Trainer with padded batches.

    python -m benchmarks.training                 # some minutes on two cores
    python -m benchmarks.training --steps 4 --warm 1

Both train the same model on the same data with the same trainable parameters in two processes, and
decode their images in one loader worker per process. A step has as many useful tokens on both
sides (on average for the padded ones). Useful tokens are those of documents, images included;
padding is not. Waiting for the loader is counted, starting up is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from mllm.evaluation import machine
from mllm.recipe import load

RECIPE = Path(__file__).parent / "training.yaml"
RESULTS = Path(__file__).parent / "results"
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 1800.0


@dataclass(slots=True)
class Speed:
    """What was measured between two steps.

    Attributes:
        name: of the contestant.
        steps: how many.
        tokens: useful tokens of all ranks.
        places: tokens and padding of all ranks.
        seconds: wall clock.
        cpu_seconds: of all processes of the contestant, loaders included.
    """

    name: str
    steps: int
    tokens: int
    places: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Useful tokens per second."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Useful tokens per CPU second."""
        return self.tokens / self.cpu_seconds


def watch(
    name: str, command: Sequence[str], metrics: Path, warm: int, steps: int, capacity: int
) -> Speed:
    """Start a contestant, and measure from the end of step `warm` to that of `warm + steps`.

    Args:
        name: of the contestant; its first word names its log.
        command: starts it.
        metrics: where it writes a line per step.
        warm, steps: steps before the measurement, and in it.
        capacity: places of a pack, for lines that count packs.

    Raises:
        RuntimeError: it ended before that, or took longer than half an hour; with its last lines.
    """
    log = metrics.parent.parent / f"{name.split(':')[0]}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=_environment()
        )
        try:
            first = _reach(process, metrics, warm, log)
            last = _reach(process, metrics, warm + steps, log)
        finally:
            _end(process)
    lines = _lines(metrics)[warm : warm + steps]
    tokens = sum(line["tokens"] for line in lines)
    places = sum(line.get("places", line.get("packs", 0) * capacity) for line in lines)
    return Speed(name, steps, tokens, places, last[0] - first[0], last[1] - first[1])


def _reach(
    process: subprocess.Popen[bytes], metrics: Path, step: int, log: Path
) -> tuple[float, float]:
    """Wait for the line of a step; return the clock and the CPU seconds of the process tree."""
    started = time.monotonic()
    while len(_lines(metrics)) < step:
        if process.poll() is not None or time.monotonic() - started > PATIENCE_SECONDS:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"it ended before step {step}; its last lines:\n{tail}")
        time.sleep(POLL_SECONDS)
    return time.monotonic(), _tree_cpu(process.pid)


def _tree_cpu(pid: int) -> float:
    total = 0.0
    for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a contestant and everything that it started."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in tree:
        try:
            one.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(tree, timeout=20)
    for one in alive:
        one.kill()
    process.wait()


def _environment() -> dict[str, str]:
    """One compute thread per process and core share, the CPU accelerator where there is no GPU."""
    environment = dict(os.environ)
    environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    return environment


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of JSON objects."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def contestants(
    recipe: Path, folder: Path, warm: int, steps: int
) -> list[tuple[str, list[str], Path]]:
    """(name, command, metrics) of all."""
    tokens = (warm + steps + 1) * load(recipe).run.tokens_per_step
    output = folder / "packed"
    train = ["-m", "mllm.cli", "train", str(recipe), "--cpus", "2"]
    ours = [sys.executable, *train, f"run.output={output}", f"run.tokens={tokens}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = [("packed: ours", ours, output / "metrics.jsonl")]
    for name, extra in (("padded: Trainer", []), ("grouped: Trainer by length", ["--grouped"])):
        metrics = folder / name.split(":")[0] / "metrics.jsonl"
        metrics.parent.mkdir()
        rival = [sys.executable, *torchrun, "-m", "benchmarks.padded", str(recipe)]
        rival += ["--steps", str(warm + steps), "--metrics", str(metrics), *extra]
        found.append((name, rival, metrics))
    return found


def rows(speeds: Sequence[Speed]) -> list[list[str]]:
    """The table's cells; ratios are to the first."""
    first = speeds[0]
    return [
        [
            speed.name,
            f"{speed.tokens / speed.steps:,.0f}",
            f"{speed.tokens / speed.places:.0%}",
            f"{speed.rate:,.0f}",
            f"{speed.cpu_rate:,.0f}",
            f"{first.rate / speed.rate:.2f}",
            f"{first.cpu_rate / speed.cpu_rate:.2f}",
        ]
        for speed in speeds
    ]


HEADS = (
    "contestant",
    "tokens/step",
    "not padding",
    "tokens/s",
    "tokens/CPU s",
    "ours ×, wall",
    "ours ×, CPU",
)


def markdown(speeds: Sequence[Speed], command: str, warm: int) -> str:
    """The result as a page of Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions().items())
    lines = [
        "# Training step",
        "",
        f"`{command}`",
        "",
        f"{time.strftime('%Y-%m-%d')}, {machine.describe()}. {versions}.",
        "",
        f"Two processes, {speeds[0].steps} steps after {warm} to warm up, stage "
        "`benchmarks/training.yaml`. Loader wait is counted, starting up is not. "
        "Tokens are useful ones, padding is not among them. Grouped: Trainer with batches of like "
        "length (its LengthGroupedSampler), which pads less and draws less at random.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|" + " --- |" * len(HEADS),
        *("| " + " | ".join(row) + " |" for row in rows(speeds)),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all, print, write."""
    parser = argparse.ArgumentParser(description="Packed training beside padded training.")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = shlex.join(["python", "-m", "benchmarks.training", *given])
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="mllm-benchmark-"))
    speeds: list[Speed] = []
    try:
        capacity = load(options.recipe).data.packing.tokens
        for name, start, metrics in contestants(
            options.recipe, folder, options.warm, options.steps
        ):
            with console.status(f"{name}: starting and {options.warm + options.steps} steps"):
                speeds.append(watch(name, start, metrics, options.warm, options.steps, capacity))
            console.print(f"{name}: {speeds[-1].rate:,.0f} useful tokens/s")
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shown = Table(*HEADS, title="Useful tokens")
    for row in rows(speeds):
        shown.add_row(*row)
    console.print(shown)
    options.results.mkdir(parents=True, exist_ok=True)
    page = options.results / "training.md"
    page.write_text(markdown(speeds, command, options.warm), encoding="utf-8")
    content = {"command": command, **machine.environment(), "speeds": [asdict(s) for s in speeds]}
    page.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
