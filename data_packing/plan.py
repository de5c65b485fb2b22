"""Which documents make which pack, and which packs make a step. The fourth noun.

A plan is a pure function of its arguments: every rank computes the same one, nothing is
communicated, and the state of the data in a checkpoint is the plan's hash and a cursor. The stream
of documents is packed in blocks of 65,536 and the packer starts afresh in each, so going on from a
cursor costs one block. Steps of packs that cost alike are cut from a block before ranks are known
(balance.py); `micro_packs` then deals a step's packs to ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_packing.balance import PackCost, balanced, contents, deal
from data_packing.index import Index
from data_packing.ledger import Ledger
from data_packing.mixture import Mixture
from data_packing.packing import pack_lengths
from data_packing.slices import ImageCost, cut

VERSION = 2
"""Raised when the same arguments would give other packs than before."""

BLOCK = 65_536
"""Documents (or slices of documents) that are packed together."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a run has come.

    Attributes:
        step: steps taken.
        block, offset: where the next step starts: the block, and the pack inside it.
    """

    step: int = 0
    block: int = 0
    offset: int = 0

    def to_json(self) -> dict[str, int]:
        """As a dictionary of three numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, int]) -> Cursor:
        """From what `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        if set(value) != {"step", "block", "offset"} or not all(
            isinstance(number, int) and number >= 0 for number in value.values()
        ):
            raise ValueError(f"not a data cursor: {value!r}")
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Entry:
    """A document, or a slice of one, in a pack.

    Attributes:
        source: number of its index in the plan.
        document: its number in that index.
        start_piece, stop_piece: which of its pieces.
        whole: whether that is all of it.
        tokens: how many tokens it takes.
    """

    source: int
    document: int
    start_piece: int
    stop_piece: int
    whole: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """A pack before anything is read: its global number, its entries, what they take together.

    `pairs` are those of tokens that attend to each other, the sum of squared document lengths.
    """

    number: int
    entries: tuple[Entry, ...]
    tokens: int
    pairs: int
    patches: int


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The packs between two updates of the model; `after` goes into the checkpoint."""

    number: int
    packs: tuple[PlannedPack, ...]
    after: Cursor

    def costs(self, cost: PackCost) -> NDArray[np.float64]:
        """What each pack costs."""
        held = np.array([(pack.tokens, pack.pairs, pack.patches) for pack in self.packs])
        return cost.of(*held.T)


@dataclass(slots=True)
class _Block:
    source: NDArray[np.int32]
    unit: NDArray[np.int64]
    tokens: NDArray[np.int64]
    packs: list[list[int]]


@dataclass(slots=True)
class _Survey:
    """What the whole run comes to; `first_pack[b]` and `first_step[b]` are where block b starts."""

    steps: int
    packs: int
    tokens: int
    first_pack: list[int]
    first_step: list[int]
    used: list[NDArray[np.bool_]]
    placed: NDArray[np.int64]
    placed_tokens: NDArray[np.int64]


class Plan:
    """The packs of a run.

    Args:
        indexes: one per source.
        weights: passes over each source per epoch.
        processor_fingerprint: of what turns documents into samples; part of the hash.
        image_cost: (height, width) -> (language tokens, vision patches).
        tokens: language tokens that a pack holds.
        patches: vision patches that a pack holds.
        tokens_per_step: a step has `max(1, tokens_per_step // tokens)` packs.
        seed: of all orders.
        max_documents: the most documents in a pack.
        epochs: how many epochs to run; or
        token_budget: run until the packed tokens reach this, to the end of that step.
        across_documents: attention crosses documents inside a pack.
        balance: what packs cost, to make steps of packs that cost alike; None leaves the packs in
            the order of packing.

    Attributes:
        slices: one `Slices` per source: its documents cut to what a pack holds.
        hash: names this plan; equal hashes mean equal packs.

    Raises:
        ValueError: arguments that make no sense, or no usable document at all.
    """

    def __init__(
        self,
        indexes: Sequence[Index],
        weights: Sequence[float],
        *,
        processor_fingerprint: str,
        image_cost: ImageCost,
        tokens: int,
        patches: int,
        tokens_per_step: int,
        seed: int,
        max_documents: int | None = None,
        epochs: int | None = None,
        token_budget: int | None = None,
        across_documents: bool = False,
        balance: PackCost | None = None,
    ) -> None:
        if (epochs is None) == (token_budget is None):
            raise ValueError("give epochs or a token budget, one of the two")
        sizes = {"tokens": tokens, "patches": patches, "tokens_per_step": tokens_per_step}
        limits = {"max_documents": max_documents, "epochs": epochs, "token_budget": token_budget}
        for name, value in (sizes | limits).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.indexes = list(indexes)
        names = [index.name for index in indexes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two sources are named {name!r}, so their documents could not be told apart; "
                    "give build_index other names (source_names makes them)"
                )
        self.tokens, self.patches, self.max_documents = tokens, patches, max_documents
        self.epochs, self.token_budget = epochs, token_budget
        self.across_documents, self.balance = across_documents, balance
        self.seed = seed
        self.packs_per_step = max(1, tokens_per_step // tokens)
        self.slices = [cut(index, image_cost, tokens, patches) for index in indexes]
        self.mixture = Mixture([len(units) for units in self.slices], weights, seed)
        self.hash = self._hash(processor_fingerprint)
        self._survey_done: _Survey | None = None
        self._last_block: tuple[int, _Block] | None = None
        if epochs is not None and self.mixture.start(epochs) == 0:
            raise ValueError("the weights are so small that the epochs hold no document")

    @property
    def total_steps(self) -> int:
        """Steps of the run. The first call packs the whole run once (0.2 s per block)."""
        return self._survey().steps

    @property
    def ledger(self) -> Ledger:
        """What becomes of every document in this run (before anything is decoded)."""
        ledger = Ledger()
        survey = self._survey()
        for index, units, used in zip(self.indexes, self.slices, survey.used, strict=True):
            bad_records = len(index.refused) - index.refused_documents
            ledger.read(index.name, len(index) + bad_records)
            for refusal in [*index.refused, *units.refused]:
                ledger.refuse(refusal)
            numbers, slices = np.unique(units.document[used], return_counts=True)
            reached = len(numbers)
            planned = dict(zip(numbers.tolist(), slices.tolist(), strict=True))
            split = zip(units.split_documents, units.split, units.pieces_refused, strict=True)
            for number, how, lost in split:
                if number in planned:
                    ledger.cut(how, lost, planned[number])
            ledger.use(index.name, reached)
            counts = len(np.unique(units.document)) - reached
            ledger.of(index.name).unreached += counts
        return ledger

    def shares(self) -> dict[str, dict[str, float]]:
        """By source: the share of the stream that its weight asks for, and what the run holds.

        `asked` and `got` count documents (or their slices), each as often as it comes; `tokens` is
        the share of the tokens. They differ where the run ends before an epoch does.
        """
        survey = self._survey()
        asked = [
            float(weight * len(units))
            for weight, units in zip(self.mixture.weights, self.slices, strict=True)
        ]
        return {
            index.name: {
                "weight": float(self.mixture.weights[source]),
                "asked": asked[source] / sum(asked),
                "got": float(survey.placed[source] / survey.placed.sum()),
                "tokens": float(survey.placed_tokens[source] / survey.placed_tokens.sum()),
            }
            for source, index in enumerate(self.indexes)
        }

    def summary(self) -> dict[str, Any]:
        """What the run comes to, for people and for JSON."""
        survey, ledger = self._survey(), self.ledger
        counts = ledger.counts.values()
        return {
            "hash": self.hash,
            "documents": sum(count.read for count in counts),
            "used": sum(count.used for count in counts),
            "split": sum(count.split for count in counts),
            "refused": sum(count.refused for count in counts),
            "unreached": sum(count.unreached for count in counts),
            "tokens": survey.tokens,
            "packs": survey.packs,
            "steps": survey.steps,
            "packs_per_step": self.packs_per_step,
            "efficiency": survey.tokens / (survey.packs * self.tokens),
            "reasons": [asdict(refusal) for refusal in ledger.refused],
        }

    def steps(self, cursor: Cursor | None = None) -> Iterator[PlannedStep]:
        """The steps of the run, from the start or from where a cursor says.

        Raises:
            ValueError: the cursor is not a place of this plan.
        """
        survey = self._survey()
        cursor = cursor or Cursor()
        self._check(cursor, survey)
        step, number, offset = cursor.step, cursor.block, cursor.offset
        while step < survey.steps:
            block = self._block(number)
            stop = min(offset + self.packs_per_step, len(block.packs))
            packs = tuple(
                self._planned(block, at, survey.first_pack[number] + at)
                for at in range(offset, stop)
            )
            step, offset = step + 1, stop
            if offset == len(block.packs):
                number, offset = number + 1, 0
            yield PlannedStep(step - 1, packs, Cursor(step, number, offset))

    def cursor(self, step: int) -> Cursor:
        """Where a step (from 0) of the run starts.

        Raises:
            ValueError: the run has no such step.
        """
        survey = self._survey()
        if not 0 <= step < survey.steps:
            raise ValueError(f"step {step} of a plan of {survey.steps} steps, counted from 0")
        block = int(np.searchsorted(survey.first_step, step, side="right")) - 1
        return Cursor(step, block, (step - survey.first_step[block]) * self.packs_per_step)

    def _check(self, cursor: Cursor, survey: _Survey) -> None:
        if cursor.step == survey.steps:
            return
        if cursor.step > survey.steps or cursor != self.cursor(cursor.step):
            raise ValueError(
                f"{cursor} is no place in this plan of {survey.steps} steps: it belongs to a plan "
                "with other data or settings"
            )

    def _block(self, number: int) -> _Block:
        """Pack one block of the stream; the last one asked for is kept."""
        last = self._last_block
        if last is None or last[0] != number:
            start, stop = number * BLOCK, (number + 1) * BLOCK
            if self.epochs is not None:
                stop = min(stop, self.mixture.start(self.epochs))
            source, unit = self.mixture.take(start, stop)
            tokens = np.zeros(len(unit), dtype=np.int64)
            patches = np.zeros(len(unit), dtype=np.int64)
            for at, units in enumerate(self.slices):
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
            if self.balance is not None:
                costs = self.balance.of(*contents(packs, tokens, patches, self.across_documents))
                order = balanced(costs, self.packs_per_step, self.seed, 3, number)
                packs = [packs[at] for at in order.tolist()]
            last = self._last_block = number, _Block(source, unit, tokens, packs)
        return last[1]

    def _planned(self, block: _Block, at: int, number: int) -> PlannedPack:
        entries, patches = [], 0
        for place in block.packs[at]:
            source, unit = int(block.source[place]), int(block.unit[place])
            units, index = self.slices[source], self.indexes[source]
            document = int(units.document[unit])
            start, stop = int(units.start_piece[unit]), int(units.stop_piece[unit])
            pieces = int(index.piece_start[document + 1] - index.piece_start[document])
            whole = (start, stop) == (0, pieces)
            entries.append(Entry(source, document, start, stop, whole, int(units.tokens[unit])))
            patches += int(units.patches[unit])
        tokens = sum(entry.tokens for entry in entries)
        pairs = tokens**2 if self.across_documents else sum(entry.tokens**2 for entry in entries)
        return PlannedPack(number, tuple(entries), tokens, pairs, patches)

    def _survey(self) -> _Survey:
        """Pack the whole run once, and keep where blocks start and what is used."""
        if self._survey_done is not None:
            return self._survey_done
        used = [np.zeros(len(units), dtype=bool) for units in self.slices]
        none = np.zeros(len(used), dtype=np.int64)
        survey = _Survey(0, 0, 0, [], [], used, none, none.copy())
        end = None if self.epochs is None else self.mixture.start(self.epochs)
        number = 0
        while (number * BLOCK < end) if end is not None else survey.tokens < self._budget:
            block = self._block(number)
            survey.first_pack.append(survey.packs)
            survey.first_step.append(survey.steps)
            tokens = np.array([int(block.tokens[pack].sum()) for pack in block.packs])
            ends = np.arange(self.packs_per_step, len(tokens) + self.packs_per_step)
            ends = np.minimum(ends[:: self.packs_per_step], len(tokens))
            reached = survey.tokens + np.cumsum(tokens)[ends - 1]
            steps = len(ends)
            if end is None:
                steps = min(steps, int(np.searchsorted(reached, self._budget)) + 1)
            packs = int(ends[steps - 1])
            places = np.concatenate([block.packs[at] for at in range(packs)]).astype(np.int64)
            for source, marks in enumerate(used):
                own = places[block.source[places] == source]
                marks[block.unit[own]] = True
                survey.placed[source] += len(own)
                survey.placed_tokens[source] += int(block.tokens[own].sum())
            survey.steps += steps
            survey.packs += packs
            survey.tokens = int(reached[steps - 1])
            number += 1
        self._survey_done = survey
        return survey

    @property
    def _budget(self) -> int:
        assert self.token_budget is not None
        return self.token_budget

    def _hash(self, processor: str) -> str:
        # The token budget is left out: it says where the stream ends and changes no pack.
        settings = {
            "version": VERSION,
            "block": BLOCK,
            "indexes": [index.fingerprint for index in self.indexes],
            "weights": [str(weight) for weight in self.mixture.weights],
            "processor": processor,
            "tokens": self.tokens,
            "patches": self.patches,
            "packs_per_step": self.packs_per_step,
            "max_documents": self.max_documents,
            "seed": self.seed,
            "epochs": self.epochs,
            "across_documents": self.across_documents,
            "balance": None if self.balance is None else asdict(self.balance),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for units in self.slices:
            for column in (units.document, units.stop_piece, units.tokens, units.patches):
                digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


def micro_packs(step: PlannedStep, rank: int, world: int) -> list[PlannedPack | None]:
    """The packs of a step that a rank works on, in order, as `deal` gives them out.

    Every rank gets equally many; None stands for a pack that a rank does not have.
    """
    own = deal(len(step.packs), rank, world)
    return [None if at is None else step.packs[at] for at in own]
