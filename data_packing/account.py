"""What a run makes of every document, up to any place of its plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_packing.ledger import Ledger
from data_packing.mixture import Picks
from data_packing.plan import Plan
from data_packing.planned import Cursor
from data_packing.window import Window

Marks = NDArray[np.bool_]


@dataclass(slots=True)
class Account:
    """What the packs before a cursor hold.

    Attributes:
        ledger: of every document of the windows that were visited.
        asked: by source, how many units the weights ask for, as a proportion.
        placed: by source, the units that are in packs, each as often as it is there.
        tokens: by source, their tokens.
    """

    ledger: Ledger
    asked: NDArray[np.float64]
    placed: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def shares(self) -> dict[str, dict[str, float]]:
        """By source: the share that its weight asks for, and what the packs hold.

        `asked` and `got` count documents (or their slices), each as often as it comes; `tokens` is
        the share of the tokens. They differ where the run ends before an epoch does.
        """
        columns = {"asked": self.asked, "got": self.placed, "tokens": self.tokens}
        return {
            source: {name: float(own[at] / max(1, own.sum())) for name, own in columns.items()}
            for at, source in enumerate(self.ledger.counts)
        }


def account(plan: Plan, cursor: Cursor) -> Account:
    """Count what is before a cursor. It packs one block at most, and reads the windows again.

    Documents of windows that the run does not come to were never read; the ledger says how many
    shards of each source that are.
    """
    corpus = plan.corpus
    counts = [np.zeros(len(corpus.resident), dtype=kind) for kind in (float, int, int)]
    found = Account(Ledger(), *counts)
    for index in plan.first.indexes:
        found.ledger.of(index.name)
    everywhere = _unused(plan.first)
    last = cursor.visit if _finished(plan, cursor) else cursor.visit + 1
    visits: dict[int, list[int]] = defaultdict(list)
    for visit in range(max(1, last)):
        visits[corpus.at(visit)].append(visit)
    for own in visits.values():
        window = plan.window(own[0])
        used = [
            everywhere[source] if resident else marks
            for source, (marks, resident) in enumerate(
                zip(_unused(window), corpus.resident, strict=True)
            )
        ]
        for visit in own:
            _follow(plan, cursor, visit, used, found)
        for source, marks in enumerate(used):
            if not corpus.resident[source]:
                _enter(found.ledger, window, source, marks)
    for source, marks in enumerate(everywhere):
        name = plan.first.indexes[source].name
        if corpus.resident[source]:
            _enter(found.ledger, plan.first, source, marks)
        else:
            unread = set(range(corpus.windows)) - visits.keys()
            shards = sum(corpus.shards(source, window) for window in unread)
            found.ledger.of(name).shards_unread += shards
    return found


def summary(plan: Plan) -> tuple[dict[str, Any], Account]:
    """What the whole run comes to, for people and for JSON. Packs all of it once."""
    found = account(plan, plan.end)
    counts = found.ledger.counts.values()
    tokens, packs = int(found.tokens.sum()), plan.total_packs
    facts = {
        "hash": plan.hash,
        "windows": plan.corpus.windows,
        "documents": sum(count.read for count in counts),
        "used": sum(count.used for count in counts),
        "split": sum(count.split for count in counts),
        "refused": sum(count.refused for count in counts),
        "unreached": sum(count.unreached for count in counts),
        "tokens": tokens,
        "packs": packs,
        "steps": plan.total_steps,
        "packs_per_step": plan.packs_per_step,
        "efficiency": tokens / (packs * plan.tokens),
        "reasons": [asdict(refusal) for refusal in found.ledger.refused],
    }
    return facts, found


def _finished(plan: Plan, cursor: Cursor) -> bool:
    """Whether nothing of the cursor's own visit is behind it."""
    return cursor.visit == plan.visits or (cursor.block, cursor.offset) == (0, 0)


def _unused(window: Window) -> list[Marks]:
    return [np.zeros(len(units), dtype=bool) for units in window.slices]


def _follow(plan: Plan, cursor: Cursor, visit: int, used: list[Marks], found: Account) -> None:
    """Mark and count what a visit has put into packs before the cursor."""
    mixture = plan.mixture(visit)
    for source, part in enumerate(mixture.parts):
        found.asked[source] += float(part.per_turn)
    for sources, units in _before(plan, cursor, visit):
        for source, marks in enumerate(used):
            own = units[sources == source]
            marks[own] = True
            found.placed[source] += len(own)
            tokens = plan.window(visit).slices[source].tokens[own]
            found.tokens[source] += int(tokens.sum())


def _before(plan: Plan, cursor: Cursor, visit: int) -> Iterator[Picks]:
    """The units of a visit that are in packs before the cursor, block by block."""
    mixture, size = plan.mixture(visit), plan.block_units(plan.window(visit))
    here = visit == cursor.visit
    if here:
        stop = cursor.block * size
    else:
        assert mixture.length is not None
        stop = mixture.length
    for start in range(0, stop, size):
        yield mixture.take(start, min(start + size, stop))
    if here and cursor.offset:
        block = plan.block(visit, cursor.block, cursor.offset % plan.packs_per_step)
        places = np.concatenate(block.packs[: cursor.offset]).astype(np.int64)
        yield block.source[places], block.unit[places]


def _enter(ledger: Ledger, window: Window, source: int, used: Marks) -> None:
    """Enter the documents of a source in a window, of which these slices are in packs."""
    index, units = window.indexes[source], window.slices[source]
    ledger.read(index.name, index.records)
    for refusal in window.refused(source):
        ledger.refuse(refusal)
    slices = np.bincount(units.document)
    planned = np.bincount(units.document[used], minlength=len(slices))
    for number, how, lost in zip(
        units.split_documents, units.split, units.pieces_refused, strict=True
    ):
        if planned[number]:
            if planned[number] < slices[number]:
                how = replace(how, reason=f"{how.reason}; {planned[number]} in the run")
            ledger.cut(how, lost, int(planned[number]))
    ledger.use(index.name, int(np.count_nonzero(planned)))
    ledger.of(index.name).unreached += int(np.count_nonzero(slices) - np.count_nonzero(planned))
