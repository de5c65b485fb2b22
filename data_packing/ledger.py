"""The account of every document: read, used, split or refused, with the reason and its key."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_packing.wording import counted

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that is not used.

    Attributes:
        source: the name of the data set.
        key: the record's name inside it (or its place, where it has no name).
        reason: why, written for a person.
        first_piece: where the lost slice starts, when it is one of a document that was cut.
    """

    source: str
    key: str
    reason: str
    first_piece: int | None = None


REASONS = 10
"""How many reasons `too_many` names."""


def too_many(refused: Sequence[Refusal], documents: int, limit: float, where: str) -> None:
    """Stop when more of the documents are refused than a run may lose.

    Args:
        refused: of them.
        documents: how many there were.
        limit: the share that may be refused.
        where: what the share is of, in words.

    Raises:
        ValueError: more are; a table of the reasons, the commonest first.
    """
    if len(refused) <= limit * documents:
        return
    reasons: dict[str, list[Refusal]] = {}
    for item in refused:
        reasons.setdefault(re.sub(r"\d[\d,.]*", "…", item.reason), []).append(item)
    lines = [
        f"  {len(items):>7,}  {items[0].reason} ({items[0].source}, {items[0].key})"
        for items in sorted(reasons.values(), key=len, reverse=True)[:REASONS]
    ]
    if len(reasons) > REASONS:
        lines.append(f"  … and {counted(len(reasons) - REASONS, 'more reason')}")
    raise ValueError(
        f"{len(refused):,} of {documents:,} {where} cannot be used, more than data.max_refused "
        f"({limit:.1%}) allows. Reasons, each with its first document:\n"
        + "\n".join(lines)
        + "\nMend the data and shard it again (mllm data lint, with --model and --tokens, names "
        "every one), or raise data.max_refused."
    )


@dataclass(slots=True)
class Counts:
    """What became of the documents of one source; read = used + refused + unreached.

    Attributes:
        read: records that were looked at.
        used: documents that are in at least one pack.
        refused: documents of which nothing is used.
        unreached: usable documents that the run ends before, or that its weight leaves out.
        split: those of `used` that were cut into several slices, or lost a piece.
        pieces_refused: pieces that fit no pack, of documents whose other pieces are used.
        shards_unread: shards that the run ends before; their documents are counted nowhere.
    """

    read: int = 0
    used: int = 0
    refused: int = 0
    unreached: int = 0
    split: int = 0
    pieces_refused: int = 0
    shards_unread: int = 0


@dataclass(slots=True)
class Ledger:
    """Counts by source, and by name every document that was refused or split.

    Attributes:
        counts: one `Counts` per source.
        refused: every document that is not used.
        split: every document that was cut, with how and why.
        slices: (source, key) of a document that was cut → its slices in the run. Not written.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    split: list[Refusal] = field(default_factory=list)
    slices: dict[tuple[str, str], int] = field(default_factory=dict, compare=False)

    def of(self, source: str) -> Counts:
        """The counts of a source, made when first asked for."""
        return self.counts.setdefault(source, Counts())

    def read(self, source: str, count: int = 1) -> None:
        """Note that documents were looked at."""
        self.of(source).read += count

    def use(self, source: str, count: int = 1) -> None:
        """Note that documents are in a pack."""
        self.of(source).used += count

    def refuse(self, refusal: Refusal) -> None:
        """Note a document of which nothing is used."""
        self.of(refusal.source).refused += 1
        self.refused.append(refusal)

    def cut(self, how: Refusal, pieces_refused: int = 0, slices: int | None = None) -> None:
        """Note a document that was split; `how.reason` says how.

        Args:
            how: the document and what was done to it.
            pieces_refused: pieces of it that fit no pack.
            slices: how many slices of it are in packs, so that `drop` sees when the last is lost.
        """
        if slices is not None:
            self.slices[how.source, how.key] = slices
        counts = self.of(how.source)
        counts.split += 1
        counts.pieces_refused += pieces_refused
        self.split.append(how)

    def drop(self, refusals: Iterable[Refusal]) -> None:
        """Note documents that were planned and then failed to read or decode.

        Give all of a run at once: a document that fails again in a later epoch is counted once. A
        document that was split keeps its other slices, and a lost one is noted with its reason;
        when all are lost, the document is refused.
        """
        cut = {(item.source, item.key) for item in self.split}
        failed: dict[tuple[str, str], dict[int | None, Refusal]] = {}
        for refusal in refusals:
            failed.setdefault((refusal.source, refusal.key), {})[refusal.first_piece] = refusal
        gone: set[tuple[str, str]] = set()
        for name, lost in failed.items():
            source, key = name
            reasons = [item.reason for item in lost.values()]
            if name in cut and len(lost) != self.slices.get(name):
                self.of(source).pieces_refused += len(lost)
                self.split += [Refusal(source, key, f"a slice is lost: {why}") for why in reasons]
                continue
            if name in cut:
                gone.add(name)
                self.of(source).split -= 1
            self.of(source).used -= 1
            self.refuse(Refusal(source, key, "; ".join(dict.fromkeys(reasons))))
        self.split = [item for item in self.split if (item.source, item.key) not in gone]

    def merge(self, other: Ledger) -> None:
        """Add another ledger's counts and names to this one."""
        for source, counts in other.counts.items():
            mine = self.of(source)
            for name, value in asdict(counts).items():
                setattr(mine, name, getattr(mine, name) + value)
        self.refused.extend(other.refused)
        self.split.extend(other.split)
        self.slices.update(other.slices)

    def write(self, path: str | Path) -> None:
        """Write as JSON lines, atomically: the counts, then one line per refused or split."""
        lines = [
            {"kind": "counts", "source": source, **asdict(counts)}
            for source, counts in self.counts.items()
        ]
        for kind, items in (("refused", self.refused), ("split", self.split)):
            lines.extend({"kind": kind, **asdict(item)} for item in items)
        partial = Path(f"{path}.{os.getpid()}.tmp")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read what `write` wrote."""
        ledger = cls()
        for line in Path(path).read_bytes().splitlines():  # of bytes: at line feeds only
            record = json.loads(line)
            kind = record.pop("kind")
            if kind == "counts":
                source = record.pop("source")
                ledger.counts[source] = Counts(**record)
            else:
                (ledger.refused if kind == "refused" else ledger.split).append(Refusal(**record))
        return ledger

    def table(self) -> Table:
        """The counts as a table for the terminal, one row per source."""
        from rich.table import Table

        names = ["read", "used", "split", "refused", "unreached"]
        if any(counts.shards_unread for counts in self.counts.values()):
            names.append("shards_unread")
        table = Table(title="Documents")
        table.add_column("source")
        for name in names:
            table.add_column(name.replace("_", " "), justify="right")
        for source, counts in self.counts.items():
            table.add_row(source, *(f"{getattr(counts, name):,}" for name in names))
        return table
