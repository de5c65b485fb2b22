"""The data sets that a `dataset_info.json` of LLaMA-Factory describes.

It maps a name to a file beside it, a `formatting` (`alpaca`, `sharegpt` or `openai`), the names of
its `columns` and, for turns, its `tags`. Sets that lie on a hub are refused: nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_packing.document import DocumentError
from data_packing.formats.common import DEFAULT, Draft, Keys, Options, not_json, refused, shown
from data_packing.formats.containers import ROWS
from data_packing.formats.media import Media, inside
from data_packing.formats.rows import rows
from data_packing.formats.table import RowFile, document, row_files

NOTE = "dataset_info.json"
_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")
_MEDIA = {
    "system": "system",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
    "tools": "tools",
}
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TURNS = {"messages": "conversations"}
_TAGS: dict[str, dict[str, str]] = {
    "sharegpt": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "system_tag": "system",
        "observation_tag": "observation",
        "function_tag": "function_call",
    },
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "tool",
        "function_tag": "function_call",
    },
}
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}


def read_llamafactory(path: Path, options: Options = DEFAULT) -> Iterator[Draft]:
    """Read the sets of a `dataset_info.json`, or of the folder it lies in, in its order.

    Every set is a source of its own; keys start with its name.

    Raises:
        ValueError: no such file, or it describes no data sets.
    """
    path = Path(path)
    path = path / NOTE if path.is_dir() else path
    for name, entry in _entries(path).items():
        try:
            files = _files(path, entry)
            layout, columns, tags = _mapping(entry)
        except (DocumentError, ValueError) as error:
            yield refused(name, name, str(error))
            continue
        yield from _read_set(name, files, layout, columns, tags, options, path.parent)


def describes_sets(value: Any) -> bool:
    """Whether a JSON value is such a description: names to objects that say where a set lies."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(entry, dict) for entry in value.values())
        and any("file_name" in entry or set(_HUBS) & entry.keys() for entry in value.values())
    )


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"llamafactory: no file at {path}")
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"llamafactory: {path} is {not_json(error)}") from error
    if not describes_sets(value):
        raise ValueError(
            f"llamafactory: {path} describes no data sets: it must map names to objects with a "
            '"file_name"'
        )
    return dict(value)


def _files(path: Path, entry: dict[str, Any]) -> list[RowFile]:
    name = entry.get("file_name")
    if not name:
        where = next((shown(repr(entry[hub])) for hub in _HUBS if hub in entry), "nowhere")
        raise DocumentError(f"the set lies on a hub ({where}) and is not fetched: download it")
    if not isinstance(name, str):
        raise DocumentError(f'"file_name" must be a text, not {shown(repr(name))}')
    files = row_files(inside(path.parent, name, "file"))
    for file in files:
        if file.kind not in ROWS:
            raise DocumentError(f"{file.path.name} is not a file of records ({file.kind})")
    return files


def _mapping(entry: dict[str, Any]) -> tuple[str, dict[str, str], dict[str, str]]:
    """The layout; its columns: ours → theirs; and its tags."""
    formatting = entry.get("formatting", "alpaca")
    if formatting != "alpaca" and formatting not in _TAGS:
        raise DocumentError(
            f'"formatting" is {shown(repr(formatting))}; known: alpaca, {", ".join(_TAGS)}'
        )
    if entry.get("ranking"):
        raise DocumentError('"ranking": preference data cannot be read')
    given, own_tags = entry.get("columns"), entry.get("tags") or {}
    if not isinstance(given, dict | None) or not isinstance(own_tags, dict):
        raise DocumentError('"columns" and "tags" must be objects')
    roles = _ALPACA if formatting == "alpaca" else _TURNS
    if given is None:
        theirs: dict[str, Any] = dict(roles)
    else:
        theirs = {key: value for key, value in given.items() if value is not None}
    known = {*_ALPACA, *_TURNS, *_MEDIA, "history"}
    unknown = [key for key, value in theirs.items() if key not in known or not _is_name(value)]
    if unknown:
        raise DocumentError(f'"columns" has {", ".join(map(repr, unknown))}, which is not read')
    ours = {**_ALPACA, **_TURNS, **_MEDIA, "history": "history"}
    columns = {ours[key]: value for key, value in theirs.items()}
    tags = {**_TAGS.get(formatting, {}), **own_tags}
    return ("alpaca" if formatting == "alpaca" else "sharegpt"), columns, tags


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _read_set(
    name: str,
    files: list[RowFile],
    layout: str,
    columns: dict[str, str],
    tags: dict[str, str],
    options: Options,
    folder: Path,
) -> Iterator[Draft]:
    keys, media = Keys(), Media(options.images or folder, options.frames)
    for file in files:
        prefix = f"{name}/{file.prefix}"
        for row in rows(file.path, file.kind):
            if row.record is None:
                yield refused(name, prefix + row.place, row.fault)
                continue
            key = keys.take(row.record, row.place, prefix)
            record = {ours: row.record.get(theirs) for ours, theirs in columns.items()}
            if layout == "sharegpt":
                record["conversations"] = _retagged(record.get("conversations"), tags)
            yield partial(document, layout, record, media, name, key)


def _retagged(turns: Any, tags: dict[str, str]) -> Any:
    """The turns with our names for the roles; what is no turn stays and is refused later."""
    if not isinstance(turns, list):
        return turns
    roles = {tags[tag]: role for tag, role in _ROLES.items() if isinstance(tags.get(tag), str)}
    said = []
    for turn in turns:
        if not isinstance(turn, dict):
            said.append(turn)
            continue
        role = turn.get(tags["role_tag"])
        said.append(
            {
                "from": roles.get(role, role) if isinstance(role, str) else role,
                "value": turn.get(tags["content_tag"]),
            }
        )
    return said
