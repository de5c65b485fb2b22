"""How fast documents come from disk: our loader beside WebDataset, one worker each.

    pip install -c constraints.txt webdataset        # it is in the extra [dev]
    python -m benchmarks.reading                     # 4,000 images, some minutes
    python -m benchmarks.reading --images 600 --rounds 1

Images of 384 x 384 with noise and shapes (about 41 KB of JPEG) and captions are drawn with a fixed
seed and written to a temporary folder twice: as our shards and as WebDataset's (jpg + txt). The
contestants take turns, so what else the machine does meets all of them. The page cache is warm.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import simplejpeg
import webdataset
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.packing import machine
from benchmarks.pictures import BATCH, CAPACITY, SIDE, draw, encode, image_cost, write
from data_packing.document import Text
from data_packing.files import OpenFiles
from data_packing.index import Index
from data_packing.loader import Loader
from data_packing.plan import Plan
from data_packing.shards import parse_span
from data_packing.workers import Memory, Workers

RATE = 270.0
"""Images that the consumer takes in a second."""

CASES_SECONDS = 20.0
"""That the consumer of each case works."""

BARS = {"decoded": 1.1, "bytes": 2.0, "wait": 0.01}
RESULT = Path(__file__).parent / "results" / "reading.md"


class SlowFiles(OpenFiles):
    """Files on a disk that takes a while for every read."""

    def __init__(self, delay: float) -> None:
        OpenFiles.__init__(self)
        self.delay = delay

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Wait, then read."""
        time.sleep(self.delay)
        return OpenFiles.read(self, path, offset, size)

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most, "delay": self.delay}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["delay"])  # type: ignore[misc]


class Bytes:
    """The task of a worker that reads and does not decode: images and captions as they lie."""

    def __init__(self, loader: Loader) -> None:
        self.reader = loader.reader

    def fetch(self, work: Any) -> Any:
        """The bytes of the documents of a pack."""
        return self.reader.fetch(work)

    def make(self, work: Any, fetched: Any, memory: Memory | None) -> tuple[Any, None]:
        """(JPEG, caption) of each."""
        documents = [parse_span(span) for span in fetched]
        texts = (part.text for one in documents for part in one.parts if isinstance(part, Text))
        images = (one.images[0].data for one in documents)
        return list(zip(images, texts, strict=True)), None


def loader_of(index: Index, workers: int, delay: float = 0.0, epochs: int = 1) -> Loader:
    """Our loader over a real plan; every pack has BATCH images."""
    plan = Plan(
        [index],
        [1.0],
        processor_fingerprint="reading",
        image_cost=image_cost,
        tokens=CAPACITY,
        patches=2**40,
        tokens_per_step=CAPACITY,
        seed=0,
        epochs=epochs,
    )
    files = SlowFiles(delay) if delay else None
    return Loader(plan, encode, rank=0, world=1, workers=workers, files=files)


def ours_decoded(index: Index, pattern: str) -> Iterator[int]:
    """Images of each pack."""
    for _, packs in loader_of(index, 1):
        yield sum(len(pack.sizes) for pack in packs)


def ours_bytes(index: Index, pattern: str) -> Iterator[int]:
    """Images of each pack, not decoded."""
    loader = loader_of(index, 1)
    workers = Workers(Bytes(loader), 1, "data_packing.loader")
    try:
        jobs = (job._replace(shared=0) for job in loader._jobs(deque()))
        for batch, _ in workers.answers(lambda: jobs, loader.prefetch):
            yield len(batch)
    finally:
        workers.close()


def simple(key: str, data: bytes) -> Any:
    """A decoder for WebDataset: JPEG through simplejpeg."""
    return simplejpeg.decode_jpeg(data, "RGB") if key.endswith("jpg") else None


def theirs(pattern: str, *decoders: Any) -> Iterator[int]:
    """WebDataset as its documentation sets it up, without the shuffling that it would need."""
    data: Any = webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False)
    if decoders:
        data = data.decode(*decoders)
    batches = data.to_tuple("jpg", "txt").batched(BATCH, collation_fn=stack if decoders else list)
    for batch in webdataset.WebLoader(
        batches, batch_size=None, num_workers=1, persistent_workers=True
    ):
        yield len(batch[0]) if decoders else len(batch)


def stack(samples: list[tuple[Any, Any]]) -> tuple[Any, list[str]]:
    """A batch of decoded images, and their captions."""
    return np.stack([image for image, _ in samples]), [text for _, text in samples]


CONTESTANTS: dict[str, Callable[[Index, str], Iterator[int]]] = {
    "decoded: ours": ours_decoded,
    "decoded: WebDataset, simplejpeg": lambda index, pattern: theirs(pattern, simple),
    "decoded: WebDataset, Pillow": lambda index, pattern: theirs(pattern, "rgb8"),
    "bytes: ours": ours_bytes,
    "bytes: WebDataset": lambda index, pattern: theirs(pattern),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """One round of one contestant: images, seconds and CPU seconds after its first batch."""

    images: int
    seconds: float
    cpu: float


def cpu_seconds() -> float:
    """Of this process and all below it."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def timed(batches: Iterator[int], total: int) -> Speed:
    """Run one contestant to its last image; starting up is not counted."""
    first = next(batches)
    started, cpu = time.perf_counter(), cpu_seconds()
    seen = first
    for count in batches:
        seen += count
        if seen == total:
            ended, ended_cpu = time.perf_counter(), cpu_seconds()
    assert seen == total, f"{seen} of {total} images"
    return Speed(total - first, ended - started, max(0.01, ended_cpu - cpu))


@dataclass(frozen=True, slots=True)
class Wait:
    """What a consumer of RATE images a second waits for: a part of its time, start left out."""

    workers: int
    delay: float
    part: float
    first: float


def waited(index: Index, workers: int, delay: float, epochs: int) -> Wait:
    """Take packs like a training step that lasts as long as its images need."""
    waits: list[float] = []
    busy = 0.0
    asked = time.perf_counter()
    for _, packs in loader_of(index, workers, delay, epochs):
        waits.append(time.perf_counter() - asked)
        images = sum(len(pack.sizes) for pack in packs)
        time.sleep(images / RATE)
        busy += images / RATE
        asked = time.perf_counter()
    later = sum(waits[1:])
    return Wait(workers, delay, later / (later + busy), waits[0])


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was measured."""

    images: int
    mean_bytes: float
    speeds: dict[str, list[Speed]]
    waits: list[Wait]

    def ratio(self, name: str, of: Callable[[Speed], float]) -> float:
        """Ours over a contestant, the median over rounds; more is better for us."""
        first = name.split(":")[0] + ": ours"
        pairs = zip(self.speeds[first], self.speeds[name], strict=True)
        return median(of(mine) / of(theirs) for mine, theirs in pairs)

    def rows(self) -> list[list[str]]:
        """Cells of the table of speeds."""
        rows = []
        for name, rounds in self.speeds.items():
            rate = median(one.images / one.seconds for one in rounds)
            per_cpu = median(one.images / one.cpu for one in rounds)
            wall = self.ratio(name, lambda one: one.images / one.seconds)
            cpu = self.ratio(name, lambda one: one.images / one.cpu)
            rows.append([name, f"{rate:,.0f}", f"{per_cpu:,.0f}", f"{wall:.2f}", f"{cpu:.2f}"])
        return rows

    def wait_rows(self) -> list[list[str]]:
        """Cells of the table of waits."""
        return [
            [
                str(wait.workers),
                f"{1000 * wait.delay:.0f} ms",
                f"{wait.part:.2%}",
                f"{wait.first:.1f} s",
                "yes" if wait.part < BARS["wait"] else "no",
            ]
            for wait in self.waits
        ]


SPEED_HEADERS = ("contestant", "images/s", "images/CPU s", "ours x, wall", "ours x, CPU")
WAIT_HEADERS = ("workers", "added to a read", "waits", "first pack", "below 1 %")


def measure(count: int, rounds: int, seed: int, workers: Sequence[int]) -> Results:
    """Draw, write, and let the contestants take turns."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        documents = list(track(draw(count, seed), "Drawing", total=count, console=console))
        index, pattern = write(documents, Path(folder))
        size = float(np.mean([len(document.images[0].data) for document in documents]))
        del documents
        speeds: dict[str, list[Speed]] = {name: [] for name in CONTESTANTS}
        turns = [name for _ in range(rounds) for name in CONTESTANTS]
        for name in track(turns, "Reading", console=console):
            speeds[name].append(timed(CONTESTANTS[name](index, pattern), count))
        epochs = max(1, round(CASES_SECONDS * RATE / count))
        cases = [(number, delay) for delay in (0.0, 0.05) for number in workers]
        waits = [
            waited(index, number, delay, epochs)
            for number, delay in track(cases, "Waiting", console=console)
        ]
        index.close()
    return Results(count, size, speeds, waits)


def as_markdown(results: Results, command: str) -> str:
    """The result page."""
    packages = ("webdataset", "simplejpeg", "pillow", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    rounds = len(next(iter(results.speeds.values())))

    def table(headers: Sequence[str], rows: list[list[str]]) -> list[str]:
        lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
        return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]

    lines = [
        "# Reading",
        "",
        f"`{command}`, {date.today().isoformat()}. {machine().replace(', one used', '')}. Python "
        f"{platform.python_version()}, {versions}.",
        "",
        f"{results.images:,} drawn JPEGs of {SIDE} x {SIDE}, {results.mean_bytes / 1000:.0f} KB "
        f"each, with captions; page cache warm, one worker, batches of {BATCH}, {rounds} rounds in "
        "turn. Medians over rounds; ratios are of the same round, and are what counts: other work "
        "shares the machine. CPU seconds are those of the worker and of the process that takes the "
        "batches. Starting up and the first batch are not counted. Ours reads in the shuffled "
        "order of the plan and packs; WebDataset reads its shards (jpg + txt) from front to back "
        "without shuffling. `bytes`: encoded images and captions reach the process undecoded. "
        "Nobody looks at the pixels that arrive.",
        "",
        f"Bars: decoded {BARS['decoded']} x WebDataset with the same decoder, bytes "
        f"{BARS['bytes']} x.",
        "",
        *table(SPEED_HEADERS, results.rows()),
        "## Waiting",
        "",
        f"A consumer that takes {RATE:.0f} images a second, as a step on a GPU would: it sleeps in "
        "between. `waits` is the part of its time that it waits for a pack, the first one left "
        "out. With the second kind of rows every single read takes 50 ms longer.",
        "",
        *table(WAIT_HEADERS, results.wait_rows()),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT, help="the page that is written")
    chosen = parser.parse_args(arguments)
    if chosen.images < 2 * BATCH or chosen.rounds < 1 or min(chosen.workers) < 1:
        parser.error(f"give at least {2 * BATCH} --images, 1 of --rounds and of --workers")

    results = measure(chosen.images, chosen.rounds, chosen.seed, chosen.workers)
    console = Console()
    for title, headers, rows in (
        ("Reading", SPEED_HEADERS, results.rows()),
        ("Waiting", WAIT_HEADERS, results.wait_rows()),
    ):
        table = Table(*headers, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    command = "python -m benchmarks.reading"
    for name in ("images", "rounds", "workers", "seed"):
        if getattr(chosen, name) != parser.get_default(name):
            values = np.atleast_1d(getattr(chosen, name))
            command += f" --{name} " + " ".join(map(str, values))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(as_markdown(results, command), encoding="utf-8")
    console.print(f"Written to {chosen.output}")


if __name__ == "__main__":
    main()
