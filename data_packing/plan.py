"""Which documents make which pack, and which packs make a step. The fourth noun.

A plan is a pure function of its arguments: every rank computes the same one, nothing is
communicated, and the state of the data in a checkpoint is the plan's hash and a cursor. The corpus
is visited window by window (corpus.py; most have one), and what a visit takes of it (mixture.py) is
packed in blocks in which the packer starts afresh, so going on from a cursor costs one window and
one block. Steps of packs that cost alike are cut from a block before ranks are known (balance.py);
`micro_packs` then deals a step's packs to ranks. What the run makes of every document is counted in
account.py.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

from data_packing.ahead import Ahead
from data_packing.balance import PackCost, balanced, contents
from data_packing.corpus import Corpus
from data_packing.index import Index
from data_packing.ledger import too_many
from data_packing.mixture import Mixture, Part, Rate
from data_packing.packing import pack_lengths
from data_packing.planned import Cursor, Entry, PlannedPack, PlannedStep
from data_packing.slices import ImageCost
from data_packing.window import Window, open_window

VERSION = 3
"""Raised when the same arguments would give other packs than before."""

BLOCK = 65_536
"""Documents (or slices of documents) that are packed together, at least."""

THIN = 10
"""Epochs without any document after which nobody waits for one."""

STEPS = 64
"""Steps that a block holds, at least: packs are sorted by cost inside a block."""


@dataclass(slots=True)
class Block:
    """Units of a visit, and the packs that they make: lists of places.

    `last` is whether the visit takes no more.
    """

    window: Window
    source: NDArray[np.int32]
    unit: NDArray[np.int64]
    tokens: NDArray[np.int64]
    packs: list[list[int]]
    last: bool


Taken = tuple[Block, int, int]
"""Packs [start, stop) of a block."""


class Plan:
    """The packs of a run.

    Args:
        data: a corpus, or the indexes of one that is small: one per source.
        weights: passes over each source per epoch.
        processor_fingerprint: of what turns documents into samples; part of the hash.
        image_cost: (height, width) -> (language tokens, vision patches).
        tokens: language tokens that a pack holds.
        patches: vision patches that a pack holds.
        tokens_per_step: a step has `max(1, tokens_per_step // tokens)` packs.
        seed: of all orders.
        caps: by source, the most documents (or slices) that an epoch takes of it; None: no limit.
        max_documents: the most documents in a pack.
        epochs: how many epochs to run; or
        token_budget: run for as many steps as have room for these tokens, rounded up.
        across_documents: attention crosses documents inside a pack.
        balance: what packs cost, to make steps of packs that cost alike; None leaves the packs in
            the order of packing.
        max_refused: the share of a window's documents that may be refused.
        seen: fingerprints of windows that the run has opened before, by number; where there are
            several. They must still be the same.
        tell: given the number and fingerprint of each of several windows when it is opened.

    Attributes:
        first: the window that the run starts in.
        hash: names this plan: equal hashes mean equal packs, as far as the first window decides
            them; the cursor names the window that it is in.

    Raises:
        ValueError: arguments that make no sense, no usable document at all, or more refused ones
            than `max_refused` (which can also happen when a later window comes).
    """

    def __init__(
        self,
        data: Corpus | Sequence[Index],
        weights: Sequence[float],
        *,
        processor_fingerprint: str,
        image_cost: ImageCost,
        tokens: int,
        patches: int,
        tokens_per_step: int,
        seed: int,
        caps: Sequence[int | None] | None = None,
        max_documents: int | None = None,
        epochs: int | None = None,
        token_budget: int | None = None,
        across_documents: bool = False,
        balance: PackCost | None = None,
        max_refused: float = 1.0,
        seen: Mapping[int, str] | None = None,
        tell: Callable[[int, str], None] = lambda number, fingerprint: None,
    ) -> None:
        if (epochs is None) == (token_budget is None):
            raise ValueError("give epochs or a token budget, one of the two")
        sizes = {"tokens": tokens, "patches": patches, "tokens_per_step": tokens_per_step}
        limits = {"max_documents": max_documents, "epochs": epochs, "token_budget": token_budget}
        for name, value in (sizes | limits).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.corpus = data if isinstance(data, Corpus) else Corpus.of(data)
        sources = len(self.corpus.resident)
        caps = [None] * sources if caps is None else caps
        if not sources == len(weights) == len(caps):
            raise ValueError(f"{sources} sources but {len(weights)} weights, {len(caps)} caps")
        self.rates = [Rate(weight, cap) for weight, cap in zip(weights, caps, strict=True)]
        self.tokens, self.patches, self.max_documents = tokens, patches, max_documents
        self.epochs, self.token_budget = epochs, token_budget
        self.across_documents, self.balance = across_documents, balance
        self.image_cost, self.seed, self.max_refused = image_cost, seed, max_refused
        self.packs_per_step = max(1, tokens_per_step // tokens)
        self._windows = Ahead(self._open)
        self._mixtures = Ahead(self._mix)
        self._blocks = Ahead(self._pack)
        self._seen, self._tell = dict(seen or {}), tell
        self._lacking = 0
        self.first = self.window(0)
        self.hash = self._hash(processor_fingerprint)
        if self.corpus.windows == 1:
            if not self.first.units:
                why = "".join(
                    f"; the first refused: {item.source} {item.key}: {item.reason}"
                    for item in self.first.all_refused()[:1]
                )
                raise ValueError(f"no source has a usable document{why}")
            if self.mixture(0).length == 0:
                raise ValueError("the weights are so small that the epochs hold no document")

    @cached_property
    def total_steps(self) -> int:
        """Steps of the run. With epochs, the first call packs it once (0.2 s for 65,536)."""
        if self.token_budget is not None:
            return ceil(self.token_budget / (self.packs_per_step * self.tokens))
        return self.end.step

    @cached_property
    def end(self) -> Cursor:
        """Where the run ends. The first call packs all of it once."""
        last = deque(self._walk(Cursor()), maxlen=1)
        if not last:
            return Cursor()
        taken, cursor = last[0]
        self._lacking = self.packs_per_step - sum(stop - start for _, start, stop in taken)
        return cursor

    @property
    def total_packs(self) -> int:
        """Packs of the run; only the last step of the epochs may have fewer than the others."""
        return self.end.step * self.packs_per_step - self._lacking

    @property
    def visits(self) -> int | None:
        """Visits of the run; None where the steps end it. One window is visited once."""
        if self.corpus.windows == 1:
            return 1
        return None if self.epochs is None else self.epochs * self.corpus.windows

    def steps(self, cursor: Cursor | None = None) -> Iterator[PlannedStep]:
        """The steps of the run, from the start or from where a cursor says.

        Raises:
            ValueError: the cursor is not a place of this plan; or as `Plan`, for later windows.
        """
        cursor = cursor or Cursor()
        number = cursor.step
        if number == self.total_steps:
            return
        self.check(cursor)
        try:
            for taken, after in self._walk(cursor):
                places = ((block, at) for block, start, stop in taken for at in range(start, stop))
                first = number * self.packs_per_step
                packs = [self._planned(*place, first + at) for at, place in enumerate(places)]
                yield PlannedStep(number, tuple(packs), after)
                number += 1
        finally:
            self.corpus.rest()

    def cursor(self, step: int) -> Cursor:
        """Where a step (from 0) of the run starts. Packs all that is before it.

        Raises:
            ValueError: the run has no such step.
        """
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} of a plan of {self.total_steps} steps, counted from 0")
        found = Cursor()
        for _, after in self._walk(found):
            if found.step == step:
                break
            found = after
        return found

    def check(self, cursor: Cursor) -> None:
        """Refuse a cursor that is no place of this plan.

        Raises:
            ValueError: it is none, or the data there is not what it was.
        """
        if cursor == Cursor() or cursor.step == self.total_steps:
            return
        visits = self.visits
        if cursor.step < self.total_steps and (visits is None or cursor.visit < visits):
            window, place = self.window(cursor.visit), (cursor.block, cursor.offset)
            if cursor.window == window.fingerprint and (place == (0, 0) or self._inside(cursor)):
                return
        raise ValueError(
            f"{cursor} is no place in this plan of {self.total_steps} steps: it belongs to a plan "
            "with other data or settings"
        )

    def _inside(self, cursor: Cursor) -> bool:
        """Whether a cursor inside a visit stands before a pack of it."""
        if cursor.block and self.block(cursor.visit, cursor.block - 1).last:
            return False
        head = cursor.offset % self.packs_per_step
        return cursor.offset < len(self.block(cursor.visit, cursor.block, head).packs)

    def window(self, visit: int) -> Window:
        """The window that a visit comes to."""
        return self._windows.get(self.corpus.at(visit))

    def mixture(self, visit: int) -> Mixture:
        """The stream of units that a visit takes; of one window, the whole run's."""
        return self._mixtures.get(visit)

    def _mix(self, visit: int) -> Mixture:
        corpus, window = self.corpus, self.window(visit)
        parts = []
        for source, (rate, units) in enumerate(zip(self.rates, window.slices, strict=True)):
            if corpus.resident[source]:
                parts.append(Part.everywhere(rate, len(units), source, corpus.windows))
                continue
            share = corpus.share(source, window.number) if rate.cap is not None else None
            parts.append(
                Part.inside(rate, len(units), source, window.number, corpus.windows, share)
            )
        if corpus.windows == 1:
            return Mixture(parts, self.seed, 0, self.epochs)
        return Mixture(parts, self.seed, visit, visit + 1)

    def block(self, visit: int, number: int, head: int = 0) -> Block:
        """A block of a visit; its first `head` packs complete the step before it."""
        return self._blocks.get((visit, number, head))

    def _walk(self, cursor: Cursor) -> Iterator[tuple[list[Taken], Cursor]]:
        """The packs of each step from a cursor on, and where the next one starts.

        A step that a block cannot fill is filled from the next one, so no step is short but the
        last of the epochs.
        """
        steps = None if self.token_budget is None else self.total_steps
        size = self.packs_per_step
        step, visit, number, at = cursor.step, cursor.visit, cursor.block, cursor.offset
        taken: list[Taken] = []
        missing, empty = size, 0
        entered: Block | None = None
        while visit != self.visits and step != steps:
            block = self.block(visit, number, (at or missing) % size)
            left = len(block.packs) - at
            if block is not entered:
                entered = block
                if steps is None or step + (size - missing + left) // size < steps:
                    self._prepare(visit, number, block.last, (missing - left) % size)
            stop = at + min(missing, left)
            if stop > at:
                taken.append((block, at, stop))
            missing, at = missing - (stop - at), stop
            if at == len(block.packs):
                empty = 0 if block.packs else empty + 1
                if empty > THIN * self.corpus.windows:
                    raise ValueError(
                        f"the weights are so small that {THIN} epochs hold no document"
                    )
                visit, number, at = (visit + 1, 0, 0) if block.last else (visit, number + 1, 0)
            if missing == 0:
                step += 1
                yield taken, self._cursor(step, visit, number, at)
                taken, missing = [], size
        if taken:
            yield taken, self._cursor(step + 1, visit, number, at)

    def _cursor(self, step: int, visit: int, block: int, offset: int) -> Cursor:
        window = "" if visit == self.visits else self.window(visit).fingerprint
        return Cursor(step, visit, block, offset, window)

    def _prepare(self, visit: int, number: int, last: bool, head: int) -> None:
        """Make in the background what comes after a block: the next block, the next window."""
        if visit + 1 != self.visits:
            self._windows.prepare(self.corpus.at(visit + 1))
        following = (visit + 1, 0, head) if last else (visit, number + 1, head)
        if following[0] != self.visits:
            self._blocks.prepare(following)

    def _open(self, number: int) -> Window:
        """Index a window and cut its documents; it must be what it was, and not too bad."""
        window = open_window(self.corpus, number, self.image_cost, self.tokens, self.patches)
        if self.corpus.windows > 1:
            if self._seen.setdefault(number, window.fingerprint) != window.fingerprint:
                raise ValueError(
                    f"the data changed since this run began: window {number + 1} of "
                    f"{self.corpus.windows}, with {window.indexes[0].paths[0].name}, is not what "
                    "it was; restore it, or start anew in another folder"
                )
            self._tell(number, window.fingerprint)
        too_many(window.all_refused(), window.records, self.max_refused, "documents")
        return window

    def block_units(self, window: Window) -> int:
        """Units of a block: whole `BLOCK`s with enough of them for `STEPS` steps."""
        if not window.tokens:
            return BLOCK
        room = STEPS * self.packs_per_step * self.tokens
        return BLOCK * ceil(room * window.units / window.tokens / BLOCK)

    def _pack(self, key: tuple[int, int, int]) -> Block:
        """Pack one block of a visit, given how many packs the step before it lacks."""
        visit, number, head = key
        window, mixture = self.window(visit), self.mixture(visit)
        size = self.block_units(window)
        stop = (number + 1) * size
        source, unit = mixture.take(number * size, stop)
        tokens = np.zeros(len(unit), dtype=np.int64)
        patches = np.zeros(len(unit), dtype=np.int64)
        for at, units in enumerate(window.slices):
            mine = source == at
            tokens[mine] = units.tokens[unit[mine]]
            patches[mine] = units.patches[unit[mine]]
        packs = pack_lengths(
            tokens,
            self.tokens,
            second=patches,
            second_capacity=self.patches,
            max_documents=self.max_documents,
        )
        if self.balance is not None and packs:
            costs = self.balance.of(*contents(packs, tokens, patches, self.across_documents))
            order = balanced(costs, self.packs_per_step, self.seed, 3, visit, number, head=head)
            packs = [packs[at] for at in order.tolist()]
        last = mixture.length is not None and stop >= mixture.length
        return Block(window, source, unit, tokens, packs, last)

    def _planned(self, block: Block, at: int, number: int) -> PlannedPack:
        entries, patches = [], 0
        for place in block.packs[at]:
            source, unit = int(block.source[place]), int(block.unit[place])
            units, index = block.window.slices[source], block.window.indexes[source]
            document = int(units.document[unit])
            start, stop = int(units.start_piece[unit]), int(units.stop_piece[unit])
            pieces = int(index.piece_start[document + 1] - index.piece_start[document])
            whole = (start, stop) == (0, pieces)
            entries.append(Entry(source, document, start, stop, whole, int(units.tokens[unit])))
            patches += int(units.patches[unit])
        tokens = sum(entry.tokens for entry in entries)
        pairs = tokens**2 if self.across_documents else sum(entry.tokens**2 for entry in entries)
        return PlannedPack(number, tuple(entries), tokens, pairs, patches, block.window.indexes)

    def _hash(self, processor: str) -> str:
        # The token budget is left out: it says where the stream ends and changes no pack.
        settings = {
            "version": VERSION,
            "block": [BLOCK, STEPS],
            "rates": [asdict(rate) for rate in self.rates],
            "processor": processor,
            "tokens": self.tokens,
            "patches": self.patches,
            "packs_per_step": self.packs_per_step,
            "max_documents": self.max_documents,
            "seed": self.seed,
            "epochs": self.epochs,
            "across_documents": self.across_documents,
            "balance": None if self.balance is None else asdict(self.balance),
            "window": self.first.fingerprint,
            "corpus": None if self.corpus.windows == 1 else self.corpus.listing,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
