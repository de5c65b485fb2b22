"""What planning a large corpus costs: time to the first step, planning, memory, by its size.

    python -m benchmarks.windows                       # 1, 4 and 16 million documents, minutes
    python -m benchmarks.windows --millions 64         # 6 GB of indexes, in --folder

The documents exist as numbers: shards of 10,000 whose tars are holes of the right size, with side
indexes and token counts as real ones have them, an image and a caption each. Every case is planned
by a process of its own, in windows and as one, through the same `Plan` that training uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.packing import machine
from data_packing.corpus import WINDOW, Corpus, Stop
from data_packing.document import Document
from data_packing.files import pack_strings, save_arrays
from data_packing.index import Index, build_index
from data_packing.plan import BLOCK, Plan
from data_packing.sample import Cost
from data_packing.shards import VERSION, index_path

SHARD = 10_000
CAPACITY = 8192
MEAN = 195  # tokens of a document
FINGERPRINT = "windows"
RESULT = Path(__file__).parent / "results" / "windows.md"


def write_corpus(folder: Path, millions: int) -> int:
    """Write shards of numbers; returns the bytes of their indexes and token counts."""
    token = hashlib.sha256(FINGERPRINT.encode()).hexdigest()[:16]
    for number in track(
        range(millions * 1_000_000 // SHARD),
        f"Writing {millions} M documents",
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ):
        shard = folder / f"big-{number:06d}.tar"
        if index_path(shard).exists():
            continue
        random = np.random.default_rng(number)
        size = 512 * random.integers(40, 120, SHARD)
        digest = np.frombuffer(hashlib.sha256(shard.name.encode()).digest(), dtype=np.uint8)
        length = int(size.sum())
        with open(shard, "wb") as file:
            file.truncate(length)
        ones = np.ones(SHARD, dtype=np.int32)
        nothing = pack_strings("cost_reasons", []) | {"cost_refused": np.zeros(0, dtype=np.int64)}
        text = (4 + np.exp(random.normal(3.7, 0.5, SHARD))).astype(np.int32)
        save_arrays(
            shard.with_name(f"{shard.stem}.tokens-{token}.npz"),
            {
                "sha256": digest,
                "overhead": ones,
                "piece_count": ones,
                "piece_text": text,
                "piece_images": ones,
                **nothing,
            },
        )
        save_arrays(
            index_path(shard),
            {
                "version": VERSION,
                "tar_size": length,
                "sha256": digest,
                "offset": np.concatenate([[0], np.cumsum(size)[:-1]]),
                "size": size,
                "crc": random.integers(0, 2**32, SHARD, dtype=np.uint32),
                "image_count": ones,
                "height": random.integers(200, 900, SHARD).astype(np.int32),
                "width": random.integers(200, 900, SHARD).astype(np.int32),
                **pack_strings("keys", [f"k{number:06d}{at:06d}" for at in range(SHARD)]),
                **pack_strings("refused_keys", []),
                **pack_strings("refused_reasons", []),
            },
        )
    return sum(file.stat().st_size for file in folder.glob("*.npz"))


def not_asked(document: Document) -> Cost:
    """Token counts are there, so nobody counts."""
    raise AssertionError(document.key)


def image_cost(height: int, width: int) -> tuple[int, int]:
    """Any image is 144 tokens."""
    return 144, 729


def corpus_of(folder: Path, window: int) -> Corpus:
    """All shards of the folder, as one source."""

    def index(source: int, paths: Sequence[Path], stop: Stop) -> Index:
        return build_index(paths, not_asked, FINGERPRINT, stop=stop)

    return Corpus([sorted(folder.glob("*.tar"))], index, window=window)


@dataclass(frozen=True, slots=True)
class Row:
    """One case.

    Attributes:
        millions: of documents.
        windows: how many.
        first: seconds until the first step is planned.
        steps, packs: of an epoch's worth of tokens.
        efficiency: share of the packs' room that is used.
        seconds, cpu: for all these steps, the first included.
        resident: MiB that the process held at most, less what it held after its imports.
    """

    millions: int
    windows: int
    first: float
    steps: int
    packs: int
    efficiency: float
    seconds: float
    cpu: float
    resident: float

    def cells(self) -> list[str]:
        """For a table."""
        blocks = self.millions * 1_000_000 / BLOCK
        return [
            f"{self.millions} M",
            str(self.windows),
            f"{self.first:.1f}",
            f"{self.seconds:.0f}",
            f"{self.cpu / blocks:.2f}",
            f"{self.resident:,.0f}",
            f"{self.efficiency:.4f}",
        ]


HEADERS = (
    "documents",
    "windows",
    "first step, s",
    "whole epoch, s",
    "CPU s per 65,536",
    "memory, MiB",
    "packs full",
)


def plan_all(folder: Path, millions: int, window: int) -> Row:
    """Plan an epoch's worth of tokens as training does, step by step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started, cpu = time.perf_counter(), time.process_time()
    corpus = corpus_of(folder, window)
    plan = Plan(
        corpus,
        [1.0],
        processor_fingerprint="windows",
        image_cost=image_cost,
        tokens=CAPACITY,
        patches=2**40,
        tokens_per_step=64 * CAPACITY,
        seed=0,
        token_budget=millions * 1_000_000 * MEAN,
    )
    first, packs, used, steps = 0.0, 0, 0, 0
    for step in plan.steps():
        first = first or time.perf_counter() - started
        steps, packs = steps + 1, packs + len(step.packs)
        used += sum(pack.tokens for pack in step.packs)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    full = used / (packs * CAPACITY)
    return Row(millions, corpus.windows, first, steps, packs, full, seconds, cpu, most - before)


def measure(folder: Path, sizes: Sequence[int]) -> Iterator[tuple[Row, int]]:
    """Each size in windows and as one, in a process of its own; and the bytes of its indexes."""
    for millions in sizes:
        own = folder / str(millions)
        own.mkdir(parents=True, exist_ok=True)
        size = write_corpus(own, millions)
        whole = millions * 1_000_000
        for window in {min(WINDOW, whole): None, whole: None}:
            command = [sys.executable, "-m", "benchmarks.windows", "--one", str(own)]
            command += ["--millions", str(millions), "--window", str(window)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            yield Row(**json.loads(printed)), size


def as_markdown(rows: Sequence[tuple[Row, int]], command: str) -> str:
    """The result page."""
    last, size = rows[-1]
    lines = [
        "# Planning in windows",
        "",
        f"`{command}`, {date.today().isoformat()}. {machine()}. Python "
        f"{platform.python_version()}, numpy {np.__version__}. Token counts are there already.",
        "",
        f"Documents of one image (144 tokens) and about 50 words, packs of {CAPACITY:,} tokens, 64 "
        "of them a step. `first step`: from nothing to the first planned step, the indexes of the "
        "window read. `whole epoch`: every step planned, by one process that does nothing else. "
        "`memory`: the most that the process held, less what it held after its imports. "
        f"Indexes and token counts take {size / last.millions / 1e6:.0f} bytes a document on disk.",
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|" + "---|" * len(HEADERS),
        *("| " + " | ".join(row.cells()) + " |" for row, _ in rows),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--folder", type=Path, help="where the indexes go; default: a temporary")
    parser.add_argument("--output", type=Path, default=RESULT, help="the page that is written")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--window", type=int, default=WINDOW, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if min(chosen.millions) < 1:
        parser.error("--millions must be at least 1")
    if chosen.one:
        print(json.dumps(asdict(plan_all(chosen.one, chosen.millions[0], chosen.window))))
        return
    with tempfile.TemporaryDirectory(prefix="windows-") as temporary:
        rows = list(measure(chosen.folder or Path(temporary), chosen.millions))
    table = Table(*HEADERS, title="Planning in windows")
    for row, _ in rows:
        table.add_row(*row.cells())
    Console().print(table)
    command = "python -m benchmarks.windows"
    if chosen.millions != parser.get_default("millions"):
        command += " --millions " + " ".join(map(str, chosen.millions))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(as_markdown(rows, command), encoding="utf-8")
    Console().print(f"Written to {chosen.output}")


if __name__ == "__main__":
    main()
