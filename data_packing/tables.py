"""What `info` and `lint` found, as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from data_packing.info import Facts, Spread, together
from data_packing.lint import ERRORS, WARNINGS, Defect, Report
from data_packing.wording import counted

SHOWN_KEYS = 3
SHOWN_REASONS = 12
_BLOCKS = "▁▂▃▄▅▆▇█"


def info_tables(facts: dict[str, Facts]) -> Group:
    """Counts, spreads and kinds of every source, and of all together."""
    rows = facts if len(facts) == 1 else {**facts, "all": together(facts)}
    tables: list[RenderableType] = [_counts(rows), _spreads(rows), _contents(rows)]
    everything = together(facts)
    if everything.variants:
        tables.append(_variants(rows))
    if everything.refused:
        tables.append(_refused(everything.refused))
    return Group(*tables)


def _table(title: str, left: Iterable[str], right: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _counts(rows: dict[str, Facts]) -> Table:
    numbers = ("shards", "documents", "images", "texts", "learned", "refused", "MiB")
    table = _table("Counts", ["source"], numbers)
    for name, facts in rows.items():
        _line_before_all(table, name)
        counts = (facts.shards, facts.documents, facts.images, facts.texts, facts.learned_texts)
        cells = [*(f"{count:,}" for count in counts), f"{facts.refused.total():,}"]
        table.add_row(Text(name), *cells, f"{facts.bytes / 2**20:,.1f}")
    return table


def _spreads(rows: dict[str, Facts]) -> Table:
    """One row per source and measure; the bars of a measure share one axis."""
    table = _table("Sizes", ["", "source"], ("least", "median", "most"))
    table.add_column("doubling", no_wrap=True)
    spreads = {name: facts.spreads() for name, facts in rows.items()}
    measures = list(dict.fromkeys(key for each in spreads.values() for key in each))
    for measure in measures:
        own = {name: each[measure] for name, each in spreads.items() if measure in each}
        low = min(spread.bins[0][0] for spread in own.values())
        high = max(spread.bins[-1][1] for spread in own.values())
        axis = f"bars: {low:,} to {high - 1:,}"
        names = [measure, axis] if len(own) > 1 else [f"{measure}\n{axis}"]
        table.add_section()
        for row, (name, spread) in enumerate(own.items()):
            table.add_row(
                Text(names[row] if row < len(names) else ""),
                Text(name),
                f"{spread.least:,}",
                f"{spread.median:,.0f}",
                f"{spread.most:,}",
                bars(spread, low),
            )
    return table


def bars(spread: Spread, low: int) -> str:
    """One block per bin from the one that starts at `low`; a bin that is not empty shows."""
    counts = {start: count for start, _, count in spread.bins}
    start, blocks, highest = low, "", max(counts.values())
    while start <= spread.bins[-1][0]:
        share = counts.get(start, 0) / highest
        blocks += _BLOCKS[min(7, int(8 * share))] if share else " "
        start = max(1, 2 * start)
    return blocks


def _contents(rows: dict[str, Facts]) -> Table:
    table = _table("Contents", ["source", "documents", "images", "letters by script"])
    for name, facts in rows.items():
        _line_before_all(table, name)
        kinds = facts.kinds + Counter({"unreadable": facts.unreadable})
        scripts = [
            f"{script} {_percent(count / facts.scripts.total())}"
            for script, count in facts.scripts.most_common()
        ]
        table.add_row(
            Text(name), _listed(kinds), _listed(facts.formats), Text(", ".join(scripts) or "none")
        )
    return table


def _variants(rows: dict[str, Facts]) -> Table:
    table = _table("Text variants", ["source", "texts that have one"])
    for name, facts in rows.items():
        _line_before_all(table, name)
        table.add_row(Text(name), _listed(facts.variants))
    return table


def _refused(refused: Counter[str]) -> Table:
    table = _table("Refused records", ["reason"], ["records"])
    for reason, count in refused.most_common(SHOWN_REASONS):
        table.add_row(Text(reason), f"{count:,}")
    if len(refused) > SHOWN_REASONS:
        table.add_row(f"… and {counted(len(refused) - SHOWN_REASONS, 'more reason')}", "")
    return table


def _listed(counts: Counter[str]) -> Text:
    return Text(", ".join(f"{count:,} {name}" for name, count in counts.most_common()) or "none")


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _line_before_all(table: Table, name: str) -> None:
    if name == "all" and table.row_count:
        table.add_section()


def lint_tables(report: Report) -> Group:
    """Errors, then warnings: kinds with their number and the first keys."""
    tables = []
    for title, kinds, style in (("Errors", ERRORS, "red"), ("Warnings", WARNINGS, "yellow")):
        table = _table(title, ["defect"], ["number"])
        table.add_column("first of them", overflow="fold", ratio=1)
        for kind in kinds:
            found = [defect for defect in report.defects if defect.kind == kind]
            if found:
                table.add_row(Text(kind, style), f"{len(found):,}", _first(found))
        if table.row_count:
            tables.append(table)
    return Group(*tables)


def _first(found: list[Defect]) -> Text:
    lines = list(_lines(found[:SHOWN_KEYS]))
    if len(found) > SHOWN_KEYS:
        lines.append(f"… and {len(found) - SHOWN_KEYS:,} more")
    return Text("\n".join(lines))


def _lines(found: Iterable[Defect]) -> Iterator[str]:
    for defect in found:
        yield (
            f"{defect.source} {defect.key}: {defect.detail}"
            if defect.key
            else (f"{defect.shard}: {defect.detail}")
        )


def verdict(report: Report) -> str:
    """The result in one line."""
    looked = (
        f"{counted(report.documents, 'document')} with {counted(report.images, 'image')} "
        f"in {counted(report.shards, 'shard')}"
    )
    if not report.defects:
        return f"{looked}: clean"
    errors, warnings = report.count("error"), report.count("warning")
    return f"{looked}: {counted(errors, 'error')}, {counted(warnings, 'warning')}"
