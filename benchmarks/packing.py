"""How full packs are, and what packing costs: ours beside next-fit and TRL's best-fit-decreasing.

    python -m benchmarks.packing                    # 10,000 and 100,000 documents, some minutes
    python -m benchmarks.packing --documents 10000  # a few seconds

TRL's own code runs if it is installed (`pip install --no-deps trl` beside `datasets`); where it is
not, the table says so. Efficiency is useful tokens / (packs x capacity), so padding is counted.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_packing import pack_lengths

CAPACITIES = (4096, 8192, 16384)
IMAGE = 144
WIDTH = 120
RESULT = Path(__file__).parent / "results" / "packing.md"

Lengths = NDArray[np.int64]
Packer = Callable[[Lengths, int], int]
"""(lengths, capacity) -> number of packs."""


def _words(random: np.random.Generator, count: int, mean: float, sigma: float) -> Lengths:
    """Log-normal text lengths of a given mean, at least 1."""
    drawn = np.exp(random.normal(np.log(mean) - sigma**2 / 2, sigma, count))
    return np.maximum(1, drawn).astype(np.int64)


def caption(random: np.random.Generator, count: int) -> Lengths:
    """One image of 144, 256 or 729 tokens and about 40 tokens of text."""
    return random.choice([144, 256, 729], count) + _words(random, count, 40, 0.6)


def interleaved(random: np.random.Generator, count: int) -> Lengths:
    """1 to 8 images of 144 tokens and about 600 tokens of text."""
    return random.integers(1, 9, count) * IMAGE + _words(random, count, 600, 0.8)


def instruct(random: np.random.Generator, count: int) -> Lengths:
    """A quarter text only, else 1 to 20 tiles of 144 tokens; about 250 tokens of text."""
    tiles = np.where(random.random(count) < 0.25, 0, random.integers(1, 21, count))
    return tiles * IMAGE + _words(random, count, 250, 0.8)


DISTRIBUTIONS = {"caption": caption, "interleaved": interleaved, "instruct": instruct}


def ours(lengths: Lengths, capacity: int) -> int:
    """The project's rule, as the plan calls it."""
    return len(pack_lengths(lengths, capacity))


def next_fit(lengths: Lengths, capacity: int) -> int:
    """Close the pack when the next document does not fit (what many loaders do)."""
    packs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths.tolist()):
        if length > room:
            packs.append([])
            room = capacity
        packs[-1].append(index)
        room -= length
    return len(packs)


def _token_table(lengths: Lengths) -> Any:
    """A table with one column of token lists; one byte a token, to keep moving them cheap."""
    import pyarrow

    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pyarrow.array(np.zeros(int(ends[-1]), dtype=np.int8))
    column = pyarrow.LargeListArray.from_arrays(pyarrow.array(ends), tokens)
    return pyarrow.table({"input_ids": column})


def trl_whole(lengths: Lengths, capacity: int) -> int:
    """TRL's best-fit-decreasing over all documents at once."""
    from trl.data_utils import _pack_bfd

    return len(_pack_bfd(_token_table(lengths), capacity))


def trl_shipped(lengths: Lengths, capacity: int) -> int:
    """`trl.pack_dataset` as its trainer calls it: best-fit-decreasing in batches of 1,000."""
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    dataset = datasets.Dataset(_token_table(lengths))
    options = {"keep_in_memory": True, "load_from_cache_file": False}
    return len(pack_dataset(dataset, capacity, "bfd", options))


def packers() -> dict[str, Packer | None]:
    """The packers by name; None where the package is not installed."""
    known = all(importlib.util.find_spec(name) for name in ("trl", "datasets", "pyarrow"))
    return {
        "ours": ours,
        "next-fit": next_fit,
        "TRL bfd 1k": trl_shipped if known else None,
        "TRL bfd all": trl_whole if known else None,
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; packs and seconds are None where the packer is not installed."""

    distribution: str
    documents: int
    capacity: int
    packer: str
    efficiency: float | None
    ratio: float | None
    seconds: float | None

    def cells(self) -> list[str]:
        """For a table: how full, ours over it, CPU seconds, documents per CPU second."""
        count = self.documents
        short = f"{count // 1000}k" if count % 1000 == 0 else str(count)
        place = [self.distribution, short, str(self.capacity), self.packer]
        if self.efficiency is None or self.ratio is None or self.seconds is None:
            return [*place, "not installed", "", "", ""]
        speed = f"{self.documents / self.seconds / 1000:,.0f}k"
        measured = [f"{self.efficiency:.4f}", f"{self.ratio:.4f}", f"{self.seconds:.2f}", speed]
        return [*place, *measured]


HEADERS = ("lengths", "docs", "tokens", "packer", "full", "ratio", "CPU s", "docs/s")


def measure(documents: Sequence[int], capacities: Sequence[int], seed: int) -> list[Row]:
    """Run every packer on every distribution, number of documents and capacity."""
    cells = [(n, name, c) for n in documents for name in DISTRIBUTIONS for c in capacities]
    rows = []
    for count, name, capacity in track(cells, "Packing", console=Console(stderr=True)):
        random = np.random.default_rng(seed)
        lengths = np.minimum(DISTRIBUTIONS[name](random, count), capacity)
        best = 0.0
        for packer, pack in packers().items():
            if pack is None:
                rows.append(Row(name, count, capacity, packer, None, None, None))
                continue
            pack(lengths[:100], capacity)  # imports and first-call costs are not what is measured
            gc.collect()
            start = time.process_time()
            packs = pack(lengths, capacity)
            seconds = max(time.process_time() - start, 1e-6)
            efficiency = float(lengths.sum()) / (packs * capacity)
            best = best or efficiency
            ratio = best / efficiency
            rows.append(Row(name, count, capacity, packer, efficiency, ratio, seconds))
    return rows


MILLION = 1_000_000
MANY_HEADERS = ("lengths", "CPU s", "docs/s", "MiB")


def many(distribution: str, documents: int, seed: int) -> list[str]:
    """Pack so many documents at 8,192 tokens in a process of their own; cells for a table.

    MiB is what packing adds to the process's peak, the lengths as an array being there already.
    """
    code = (
        "import resource, time\n"
        "import numpy as np\n"
        "from benchmarks.packing import DISTRIBUTIONS, pack_lengths\n"
        f"lengths = DISTRIBUTIONS[{distribution!r}](np.random.default_rng({seed}), {documents})\n"
        "lengths = np.minimum(lengths, 8192)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, start = peak(), time.process_time()\n"
        "packs = pack_lengths(lengths, 8192)\n"
        "print(time.process_time() - start, peak() - before)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    seconds, memory = map(float, printed.split())
    speed = f"{documents / seconds / 1000:,.0f}k"
    return [distribution, f"{seconds:.2f}", speed, f"{memory:.0f}"]


def machine() -> str:
    """The processor, as the operating system names it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        name = next(named, f": {name}").split(":", 1)[1].strip()
    return f"{name}, {os.cpu_count()} cores visible, one used"


def versions() -> str:
    """Python and the packages whose code ran."""
    names = [
        name for name in ("numpy", "trl", "datasets", "pyarrow") if importlib.util.find_spec(name)
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Python {platform.python_version()}, {packages}"


def as_markdown(rows: Sequence[Row], large: Sequence[list[str]], count: int, command: str) -> str:
    """The result page."""
    lines = [
        "# Packing",
        "",
        f"`{command}`, {date.today().isoformat()}. {machine()}. {versions()}.",
        "",
        "`full`: useful tokens / (packs x capacity). `ratio`: our fill divided by "
        "the packer's. `TRL bfd 1k` is `trl.pack_dataset` as its trainer calls it, in batches of "
        "1,000 rows; `TRL bfd all` is the same code over the whole table. CPU seconds of one "
        "process; TRL's include moving its token column (one byte a token), which it cannot pack "
        "without; ours and next-fit see lengths only.",
        "",
        "Lengths: caption = 144, 256 or 729 image tokens + text of mean 40; interleaved = 1-8 x "
        "144 + text of mean 600; instruct = a quarter without image, else 1-20 x 144, + text of "
        "mean 250. Text is log-normal (sigma 0.6, 0.8, 0.8); all cut at the capacity.",
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|" + "---|" * len(HEADERS),
    ]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    lines += [
        "",
        f"## {count:,} documents at once",
        "",
        "Ours at 8,192 tokens, one process each; MiB is what packing adds to its peak. Bars: 10 "
        "seconds and 150 MB for a million.",
        "",
        "| " + " | ".join(MANY_HEADERS) + " |",
        "|" + "---|" * len(MANY_HEADERS),
        *("| " + " | ".join(cells) + " |" for cells in large),
    ]
    return "\n".join(lines) + "\n"


def as_table(rows: Sequence[Row]) -> Table:
    """The same for the terminal."""
    table = Table(title="Packing", box=box.SIMPLE, pad_edge=False)
    for number, header in enumerate(HEADERS):
        justify: Literal["left", "right"] = "left" if number in (0, 3) else "right"
        table.add_column(header, justify=justify, no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*row.cells(), end_section=(number + 1) % len(packers()) == 0)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--capacities", type=int, nargs="+", default=list(CAPACITIES))
    parser.add_argument("--at-once", type=int, default=MILLION, help="for the last table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT, help="the page that is written")
    chosen = parser.parse_args(arguments)
    if min(*chosen.documents, chosen.at_once) < 1 or min(chosen.capacities) < 1:
        parser.error("--documents, --capacities and --at-once must be at least 1")
    large = [many(name, chosen.at_once, chosen.seed) for name in DISTRIBUTIONS]
    rows = measure(chosen.documents, chosen.capacities, chosen.seed)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)  # whole columns in a file or a pipe
    console.print(as_table(rows))
    table = Table(*MANY_HEADERS, title=f"{chosen.at_once:,} documents at once", box=box.SIMPLE)
    for cells in large:
        table.add_row(*cells)
    console.print(table)
    command = "python -m benchmarks.packing"
    for name in ("documents", "capacities", "at_once", "seed"):
        if getattr(chosen, name) != parser.get_default(name):
            values = np.atleast_1d(getattr(chosen, name))
            command += f" --{name.replace('_', '-')} " + " ".join(map(str, values))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(as_markdown(rows, large, chosen.at_once, command), encoding="utf-8")
    Console().print(f"Written to {chosen.output}")


if __name__ == "__main__":
    main()
