"""The rows of a file, one after another: JSON, JSON lines, parquet, Arrow.

JSON lines are read by line, parquet and Arrow by batches; a JSON list is read whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_packing.formats.common import not_json
from data_packing.formats.containers import HEAD, LINES, Container

if TYPE_CHECKING:
    import pyarrow

BATCH = 32
"""Rows of parquet and Arrow that are held at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row and where it stands.

    Attributes:
        place: "line 3" or "record 3".
        record: the row by column, or None when it cannot be read.
        fault: why it cannot be read.
    """

    place: str
    record: dict[str, Any] | None
    fault: str = ""


def rows(path: Path, kind: Container) -> Iterator[Row]:
    """Read the rows of a file in order. What is damaged is a row with a fault.

    Raises:
        ValueError: nothing of the file can be read.
    """
    if kind == "json":
        return _json_rows(path)
    if kind == "jsonl":
        return _line_rows(path)
    if kind == "object":
        raise ValueError(f"{path} holds one JSON object, not a list of records")
    if kind == "tar":
        raise ValueError(f"{path} is a tar, not a file of records")
    return _table_rows(_parquet_batches(path) if kind == "parquet" else _arrow_batches(path, kind))


def first_records(path: Path, kind: Container, count: int = 20) -> list[dict[str, Any]]:
    """The first usable records of a file, for finding out their layout.

    Raises:
        ValueError: as `rows`.
    """
    if kind == "json":
        found = [item for item in _array_head(path) if isinstance(item, dict)]
        if found:
            return found[:count]
    looked_at = islice(rows(path, kind), LINES if kind in ("json", "jsonl") else count)
    return list(islice((row.record for row in looked_at if row.record is not None), count))


def _array_head(path: Path) -> Iterator[Any]:
    """The elements at the beginning of a JSON list, as far as the first bytes show them whole."""
    with open(path, "rb") as file:
        text = file.read(HEAD).decode("utf-8-sig", "ignore").lstrip()
    decoder, at = json.JSONDecoder(), 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            element, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        yield element


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is {not_json(error)}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} holds {type(records).__name__}, not a list of records")
    for number, record in enumerate(records, start=1):
        yield _row(f"record {number}", record)


def _line_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                yield _row(place, json.loads(line.decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                yield Row(place, None, f"not UTF-8 (byte {error.start} of the line)")
            except (ValueError, RecursionError) as error:
                yield Row(place, None, not_json(error))


def _row(place: str, record: Any) -> Row:
    if isinstance(record, dict):
        return Row(place, record)
    return Row(place, None, f"a record must be an object, not {type(record).__name__}")


def _parquet_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is a broken parquet file: {error}") from error
    with closing(file):
        yield from file.iter_batches(BATCH)


def _arrow_batches(path: Path, kind: Container) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = ipc.open_file(source) if kind == "arrow" else ipc.open_stream(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is a broken Arrow file: {error}") from error
        batches = (
            iter(reader)
            if kind == "arrow stream"
            else map(reader.get_batch, range(reader.num_record_batches))
        )
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                yield batch.slice(start, BATCH)


def _table_rows(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for place in range(batch.num_rows):
                number += 1
                yield _table_row(f"record {number}", batch.slice(place, 1))
    except (pyarrow.ArrowException, OSError) as error:
        fault = f"the file is damaged or cut short from here: {error}"
        yield Row(f"record {number + 1}", None, fault)


def _table_row(place: str, row: pyarrow.RecordBatch) -> Row:
    import pyarrow

    try:
        return Row(place, row.to_pylist(maps_as_pydicts="strict")[0])
    except UnicodeDecodeError as error:
        return Row(place, None, f"text that is not UTF-8 (byte {error.start})")
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
        return Row(place, None, f"cannot be read: {error}")
