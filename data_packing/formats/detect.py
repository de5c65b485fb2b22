"""Which format a data set has, found from what is in it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from data_packing.formats.captions import is_media
from data_packing.formats.containers import container
from data_packing.formats.llamafactory import NOTE, describes_sets
from data_packing.formats.rows import first_records
from data_packing.formats.table import ENDINGS, HIDDEN, count_of, is_pattern, layout_of, row_files
from data_packing.shards import expand
from data_packing.storage import here


def detect(path: str | Path) -> str:
    """The name of the format that a file, a folder or a pattern has.

    Raises:
        ValueError: nothing there, a URL, no known format, or several; it says what was seen.
    """
    path = here(path)
    if path.is_dir():
        return _of_folder(path)
    file = path
    if not path.exists() and is_pattern(path):
        file = expand(path)[0]
    kind = container(file)
    if kind == "tar":
        return "webdataset"
    if kind == "object" and _is_description(file):
        return "llamafactory"
    if kind == "jsonl":
        found = first_records(file, kind, 2)
        if len(found) == 1 and describes_sets(found[0]):
            return "llamafactory"  # written on one line
    if kind == "object":
        raise ValueError(
            f"{path} holds one JSON object, which is neither a list of records nor a "
            f"description of data sets ({NOTE} of LLaMA-Factory)"
        )
    return layout_of(path, row_files(path))


def _of_folder(path: Path) -> str:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return layout_of(path, row_files(path))
    if (path / NOTE).is_file() and _is_description(path / NOTE):
        return "llamafactory"
    seen = _seen(path)
    pairs = seen["caption"] if seen["image or clip"] else 0
    tables = sum(count for kind, count in seen.items() if kind in ENDINGS)
    candidates = [
        name
        for name, count in (("captions", pairs), ("tars", seen["tar"]), ("records", tables))
        if count
    ]
    if len(candidates) > 1:
        raise ValueError(
            f"{path} holds {count_of(seen)}: which is meant? Name the format, or give the files"
        )
    if candidates == ["tars"]:
        return "webdataset"
    if candidates == ["records"]:
        return layout_of(path, row_files(path))
    if seen["image or clip"] or seen["caption"]:
        return "captions"
    found = f"only {count_of(seen)}" if seen else "nothing"
    raise ValueError(
        f"{path} holds {found}: no images, no tar, no JSON, no parquet and no folder that "
        "datasets saved"
    )


def _seen(path: Path) -> Counter[str]:
    """How many files of each kind lie in a folder and the folders in it."""
    seen: Counter[str] = Counter()
    for file in path.rglob("*"):
        ending = file.suffix.lower()
        if file.name.startswith(HIDDEN) or not file.is_file():
            continue
        if is_media(file):
            seen["image or clip"] += 1
        elif ending == ".txt":
            seen["caption"] += 1
        elif ending == ".tar":
            seen["tar"] += 1
        else:
            seen[ending if ending in ENDINGS else f"{ending or 'nameless'} file"] += 1
    return seen


def _is_description(path: Path) -> bool:
    try:
        return describes_sets(json.loads(path.read_bytes().decode("utf-8-sig")))
    except (ValueError, RecursionError):
        return False
