"""How long ranks wait for the slowest: our steps beside packs dealt at random.

    python -m benchmarks.balance                     # 200,000 documents, some minutes
    python -m benchmarks.balance --documents 65536   # a part of it

Nothing is trained: the cost of every pack is computed from the model's shape, and the figure is the
sum of what the slowest rank costs in every micro-step over the sum of the means. Each rank has one
pack per step, which is the hardest case.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.packing import DISTRIBUTIONS, IMAGE, machine
from data_packing import plan as plan_module
from data_packing.balance import PackCost, contents, straggler
from data_packing.files import OpenFiles
from data_packing.index import Index
from data_packing.packing import _best_fit_decreasing, pack_lengths
from data_packing.plan import Plan

RANKS = (8, 64, 512)
CASES = (("caption", 4096), ("interleaved", 8192), ("instruct", 8192))
PATCHES = 729
BARS = {"7B": 1.01, "1.5B": 1.03}
RESULT = Path(__file__).parent / "results" / "balance.md"

Counts = NDArray[np.int64]


def cost_of(weights: float, layers: int, width: int) -> PackCost:
    """A language model that learns, with SigLIP-so400m (27 layers of 1152) that learns.

    Multiply-adds as in mllm/training/pack_cost.py: three per weight and token, 3 x layers x width
    per squared token of a document, and per patch the encoder's weights and its attention over 729.
    """
    encoder = 27 * (4 * 1152**2 + 2 * 1152 * 4304) + 588 * 1152 + 27 * 2 * PATCHES * 1152
    return PackCost(3 * weights, 3 * layers * width, 3 * encoder)


MODELS = {"7B": cost_of(7.6e9, 28, 3584), "1.5B": cost_of(1.54e9, 28, 1536)}
"""Shapes of Qwen2.5, the widths of its attention."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Language tokens of documents, and how many images each has."""

    tokens: Counts
    images: Counts

    @property
    def patches(self) -> Counts:
        """Vision patches of each."""
        return self.images * PATCHES


def documents(name: str, count: int, capacity: int, seed: int) -> Documents:
    """The lengths of benchmarks/packing.py, with the images that they stand for."""
    random = np.random.default_rng(seed)
    lengths = DISTRIBUTIONS[name](random, count)
    # The same generator again: images are drawn first there, so the same numbers come out.
    again = np.random.default_rng(seed)
    if name == "caption":
        images = np.ones(count, dtype=np.int64)
    elif name == "interleaved":
        images = again.integers(1, 9, count)
    else:
        images = np.where(again.random(count) < 0.25, 0, again.integers(1, 21, count))
    return Documents(np.minimum(lengths, capacity), np.minimum(images, capacity // IMAGE))


def index_of(rows: Documents) -> Index:
    """An index of documents that exist as numbers only: one piece each, images of one size."""
    count = len(rows.tokens)
    zeros = np.zeros(count, dtype=np.int64)
    return Index(
        name="synthetic",
        paths=[Path("synthetic.tar")],
        shard=zeros.astype(np.int32),
        offset=zeros,
        size=zeros,
        crc=zeros.astype(np.uint32),
        overhead=zeros.astype(np.int32),
        piece_start=np.arange(count + 1, dtype=np.int64),
        piece_text=rows.tokens.astype(np.int32),
        piece_image_start=np.concatenate([[0], np.cumsum(rows.images)]),
        height=np.ones(int(rows.images.sum()), dtype=np.int32),
        width=np.ones(int(rows.images.sum()), dtype=np.int32),
        refused=[],
        refused_documents=0,
        fingerprint="synthetic",
        _shard_start=np.zeros(2, dtype=np.int64),
        _files=OpenFiles(),
    )


def no_tokens(height: int, width: int) -> tuple[int, int]:
    """An image's tokens are counted in the lengths; it costs patches only."""
    return 0, PATCHES


def ours(rows: Documents, capacity: int, world: int, cost: PackCost) -> list[NDArray[np.float64]]:
    """The costs of the steps of a real plan with one pack per rank."""
    plan = Plan(
        [index_of(rows)],
        [1.0],
        processor_fingerprint="synthetic",
        image_cost=no_tokens,
        tokens=capacity,
        patches=2**40,
        tokens_per_step=world * capacity,
        seed=0,
        epochs=1,
        balance=cost,
    )
    return [step.costs(cost) for step in plan.steps()]


def at_random(costs: NDArray[np.float64], world: int) -> list[NDArray[np.float64]]:
    """Packs dealt at random, one per rank and step."""
    order = np.random.default_rng(1).permutation(len(costs))
    return [costs[order[at : at + world]] for at in range(0, len(costs), world)]


@cache
def packed(name: str, count: int, capacity: int, seed: int, rule: str) -> tuple[Counts, ...]:
    """Tokens, pairs and patches of every pack: our packing rule, or best-fit-decreasing."""
    rows = documents(name, count, capacity, seed)
    held = []
    for start in range(0, count, plan_module.BLOCK):
        part = slice(start, start + plan_module.BLOCK)
        tokens = rows.tokens[part]
        if rule == "ours":
            packs = pack_lengths(tokens, capacity)
        else:
            packs = _best_fit_decreasing(tokens.tolist(), capacity)
        held.append(contents(packs, tokens, rows.patches[part], False))
    return tuple(np.concatenate(columns) for columns in zip(*held, strict=True))


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: the ratio over full steps, and over all of them."""

    distribution: str
    capacity: int
    model: str
    world: int
    dealing: str
    ratio: float
    with_rest: float
    spread: float

    @property
    def met(self) -> str:
        """Whether the bar is met, where there is one."""
        if self.dealing != "ours":
            return ""
        return "yes" if self.ratio <= BARS[self.model] else "no"

    def cells(self) -> list[str]:
        """For a table."""
        figures = [f"{value:.4f}" for value in (self.ratio, self.with_rest, self.spread)]
        place = [self.distribution, str(self.capacity), self.model, str(self.world)]
        return [*place, self.dealing, *figures, self.met]


HEADERS = (
    "lengths",
    "tokens",
    "model",
    "ranks",
    "dealing",
    "max/mean",
    "with the rest",
    "steps differ",
    "bar",
)


def row(
    steps: list[NDArray[np.float64]], name: str, capacity: int, model: str, world: int, dealing: str
) -> Row:
    """Measure the steps of one way of dealing. Full steps have a pack for every rank."""
    full = [costs for costs in steps if len(costs) == world]
    if not full:
        raise ValueError(f"too few documents for one step of {world} packs")
    means = np.array([costs.mean() for costs in full])
    spread = float(means.std() / means.mean())
    ratios = straggler(full, world), straggler(steps, world)
    return Row(name, capacity, model, world, dealing, *ratios, spread)


def measure(count: int, ranks: Sequence[int], seed: int) -> Iterator[Row]:
    """Every distribution, model, number of ranks and way of dealing."""
    cells = [(case, model, world) for case in CASES for model in MODELS for world in ranks]
    for (name, capacity), model, world in track(
        cells, "Dealing", console=Console(stderr=True), disable=not sys.stderr.isatty()
    ):
        cost = MODELS[model]
        steps = {"ours": ours(documents(name, count, capacity, seed), capacity, world, cost)}
        for dealing, rule in (("random", "ours"), ("BFD, random", "bfd")):
            tokens, pairs, patches = packed(name, count, capacity, seed, rule)
            steps[dealing] = at_random(cost.of(tokens, pairs, patches), world)
        for dealing, dealt in steps.items():
            yield row(dealt, name, capacity, model, world, dealing)


def as_markdown(rows: Sequence[Row], command: str) -> str:
    """The result page."""
    missed = [r for r in rows if r.met == "no"]
    verdict = (
        "Every row of ours meets it over full steps."
        if not missed
        else f"{len(missed)} rows of ours miss it."
    )
    lines = [
        "# Balance",
        "",
        f"`{command}`, {date.today().isoformat()}. {machine()}. Python "
        f"{platform.python_version()}, numpy {np.__version__}. A simulation: no model runs.",
        "",
        "`max/mean`: the sum of the slowest rank's cost over the sum of the mean, one pack per "
        "rank and step, over full steps. `with the rest`: the same with the last step, which has "
        "what is left over, so that some ranks have nothing. `steps differ`: standard "
        "deviation of the steps' mean cost, the price of sorting: what one step learns from is "
        "more alike.",
        "",
        "Cost of a pack: tokens x weights + pairs x layers x width of attention + patches x the "
        "encoder's multiply-adds, three passes each. 7B and 1.5B are Qwen2.5's shapes, with a "
        "SigLIP-so400m that learns, 729 patches an image. `ours` is the plan as training makes "
        "it; `random` are the same packs, `BFD` those of best-fit-decreasing.",
        "",
        f"Bars: at most {BARS['7B']} (7B) and {BARS['1.5B']} (1.5B). {verdict}",
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|" + "---|" * len(HEADERS),
    ]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT, help="the page that is written")
    chosen = parser.parse_args(arguments)
    if chosen.documents < 1 or min(chosen.ranks) < 1:
        parser.error("--documents and --ranks must be at least 1")
    rows = list(measure(chosen.documents, chosen.ranks, chosen.seed))
    table = Table(*HEADERS, title="Balance")
    for one in rows:
        table.add_row(*one.cells(), end_section=one.dealing == "BFD, random")
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    command = "python -m benchmarks.balance"
    for name in ("documents", "ranks", "seed"):
        if getattr(chosen, name) != parser.get_default(name):
            values = np.atleast_1d(getattr(chosen, name))
            command += f" --{name} " + " ".join(map(str, values))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(as_markdown(rows, command), encoding="utf-8")
    Console().print(f"Written to {chosen.output}")


if __name__ == "__main__":
    main()
