"""Files of records in one of the layouts, in whatever file keeps them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_packing.document import Document, DocumentError
from data_packing.formats.common import DEFAULT, Draft, Keys, Options, refused, source_name
from data_packing.formats.containers import ROWS, Container, container
from data_packing.formats.layouts import LAYOUTS, layouts_of
from data_packing.formats.media import Media
from data_packing.formats.rows import first_records, rows
from data_packing.ledger import Refusal
from data_packing.shards import expand
from data_packing.wording import counted

ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
HIDDEN = (".", "_")
_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file of rows.

    Attributes:
        path: where it lies.
        kind: how it keeps its rows.
        prefix: what its keys start with, where a data set has several files.
    """

    path: Path
    kind: Container
    prefix: str = ""


def read_layout(name: str, path: Path, options: Options = DEFAULT) -> Iterator[Draft]:
    """Read records of one layout, in the order of their files.

    Raises:
        ValueError: no such file, no file of records, or records of another layout.
    """
    path = Path(path)
    try:
        files = row_files(path)
        _check(name, path, files)
        yield from read_files(name, files, source_of(path), options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_files(name: str, files: list[RowFile], source: str, options: Options) -> Iterator[Draft]:
    """Read the records of files whose layout is known."""
    keys = Keys()
    for file in files:
        media = Media(options.images or file.path.parent, options.frames)
        for row in rows(file.path, file.kind):
            key = file.prefix + row.place
            if row.record is None:
                yield refused(source, key, row.fault)
                continue
            key = keys.take(row.record, row.place, file.prefix)
            yield partial(document, name, row.record, media, source, key)


def document(
    name: str, record: dict[str, Any], media: Media, source: str, key: str
) -> Document | Refusal:
    """The document of one record, or why there is none."""
    try:
        return Document(tuple(LAYOUTS[name].parts(record, media)), source, key)
    except DocumentError as error:
        return Refusal(source, key, str(error))


def row_files(path: Path) -> list[RowFile]:
    """The files of a data set: one file, a pattern, a folder of them, a folder of `datasets`.

    Raises:
        ValueError: none, or files of several kinds in one folder.
    """
    if path.is_file():
        return [RowFile(path, container(path))]
    if not path.is_dir():
        found = expand(path) if is_pattern(path) else []
        if not found:
            raise ValueError(f"no file at {path}")
        return _several(found)
    for note in ("dataset_dict.json", "state.json"):
        if (path / note).is_file():
            return _several(saved_files(path))
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in ENDINGS
        and file.name not in _NOTES
        and not file.name.startswith(HIDDEN)
        and file.is_file()
    ]
    if not found:
        raise ValueError(f"no file of records in {path} (looked for {', '.join(ENDINGS)})")
    kinds = Counter(file.suffix.lower() for file in found)
    if len(kinds) > 1 or (len(found) > 1 and ".json" in kinds):
        raise ValueError(
            f"{path} holds {count_of(kinds)}: give one of them, or a pattern such as "
            f"{path / ('*' + found[0].suffix)}"
        )
    return _several(found)


def count_of(kinds: Counter[str]) -> str:
    """How many there are of each, in words."""
    return ", ".join(
        f"{count:,} {kind}" if kind in ENDINGS else counted(count, kind)
        for kind, count in sorted(kinds.items())
    )


def _several(files: list[Path]) -> list[RowFile]:
    if len(files) == 1:
        return [RowFile(files[0], container(files[0]))]
    named = zip(files, names_of(files), strict=True)
    return [RowFile(file, container(file), f"{name}/") for file, name in named]


def names_of(files: list[Path]) -> list[str]:
    """A name for each of several files: its path below the folder they share, without ending."""
    shared = os.path.commonpath([file.parent for file in files])
    return [file.relative_to(shared).with_suffix("").as_posix() for file in files]


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved, in order; of all its splits, if several.

    Raises:
        ValueError: a note in it is broken, or names a file that is not there.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _note(splits).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{splits} has no list of splits")
        return [file for name in names for file in saved_files(_beside(splits, name))]
    state = folder / "state.json"
    entries = _note(state).get("_data_files")
    if not isinstance(entries, list):
        raise ValueError(f"{state} has no list of data files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    files = [_beside(state, name) for name in names]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{state} names {file.name}, which is not there")
    return files


def _note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return note if isinstance(note, dict) else {}


def _beside(note: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{note} names {name!r}, which must be a plain file name")
    return note.parent / name


def source_of(path: Path) -> str:
    """The name of a data set given as a file, a folder or a pattern."""
    if not path.exists():
        while is_pattern(path):  # the folder that it starts from
            path = path.parent
    return source_name(path)


def is_pattern(path: Path) -> bool:
    """Whether a path that does not exist stands for several."""
    return any(sign in str(path) for sign in "*?[{")


def layout_of(path: Path, files: list[RowFile]) -> str:
    """The layout of the first records of a data set.

    Raises:
        ValueError: no layout, or several; it says what was seen.
    """
    records = sample(files)
    if not records:
        raise ValueError(f"{path} holds no record (an object with columns)")
    seen = [tuple(layouts_of(record)) for record in records]
    names = sorted({name for fitting in seen for name in fitting}, key=list(LAYOUTS).index)
    if not names:
        known = "; ".join(f"{name}: {layout.needs}" for name, layout in LAYOUTS.items())
        raise ValueError(f"{path} has {columns_of(records)}, which is no known layout ({known})")
    for name in reversed(names):
        if set(names) <= {name, *LAYOUTS[name].also}:
            return name
    raise ValueError(
        f"{path} has {columns_of(records)}, which can be {' or '.join(names)}: name the format"
    )


def sample(files: list[RowFile]) -> list[dict[str, Any]]:
    """The first usable records of a data set."""
    for file in files:
        if file.kind not in ROWS:
            what = "one JSON object" if file.kind == "object" else f"a {file.kind} file"
            raise ValueError(f"{file.path} is {what}, not a file of records")
        records = first_records(file.path, file.kind)
        if records:
            return records
    return []


def columns_of(records: list[dict[str, Any]]) -> str:
    """The columns of records, in words."""
    names = list(dict.fromkeys(name for record in records for name in record))
    shown = ", ".join(f'"{name}"' for name in names[:12])
    return f"the columns {shown}{', …' if len(names) > 12 else ''}" if names else "no columns"


def _check(name: str, path: Path, files: list[RowFile]) -> None:
    """Refuse a format that none of the first records has."""
    records = sample(files)
    layout = LAYOUTS[name]
    reads = [layout, *(LAYOUTS[other] for other in layout.also)]
    if any(each.fits(record) for record in records for each in reads):
        return
    looks = {other for record in records for other in layouts_of(record)}
    guess = f"; it looks like {' or '.join(sorted(looks))}" if looks else ""
    raise ValueError(f"{path} has {columns_of(records)}, where {layout.needs} is needed{guess}")
