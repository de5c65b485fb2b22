"""WebDataset: tar files in which the members of one name, one after another, are one document.

`0001.jpg` and `0001.txt` are an image and its caption, `0001.alt.txt` is its text named `alt`. A
sidecar `0001.json` may hold the caption and named texts, or a record in one of the layouts; its
images and clips are the other members of that name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from data_packing import video
from data_packing.document import Document, DocumentError, Part
from data_packing.formats import captions
from data_packing.formats.common import DEFAULT, Draft, Options, not_json, refused, shown
from data_packing.formats.containers import container
from data_packing.formats.conversation import listed
from data_packing.formats.layouts import CAPTIONS, LAYOUTS, layouts_of
from data_packing.formats.media import Media
from data_packing.formats.table import names_of, source_of
from data_packing.formats.tars import Member, members
from data_packing.formats.variants import read_variants, text_of
from data_packing.ledger import Refusal
from data_packing.shards import expand

TEXTS = ("txt", "text", "caption", "cap")


@dataclass(slots=True)
class _Group:
    """The members of one name, by kind: ending → bytes; named texts by their name."""

    name: str
    images: dict[str, bytes] = field(default_factory=dict)
    clips: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    variants: dict[str, bytes] = field(default_factory=dict)
    sidecar: bytes | None = None
    others: list[str] = field(default_factory=list)


def read_webdataset(path: Path, options: Options = DEFAULT) -> Iterator[Draft]:
    """Read a tar, the tars of a folder, or those of a pattern (`{000..099}.tar`, `*.tar`).

    The key is the tar's name, a slash, and the members' name. Members that are neither image, clip,
    text nor JSON are not looked at; nothing is unpickled or written to disk.

    Raises:
        ValueError: nothing there, or a file that is no tar.
    """
    path = Path(path)
    try:
        tars = [path] if path.is_file() else expand(path)
        for tar in tars:
            kind = container(tar)
            if kind != "tar":
                raise ValueError(f"{tar} is a {kind} file, not a tar")
    except ValueError as error:
        raise ValueError(f"webdataset: {error}") from error
    source, seen = source_of(path), set[str]()
    for tar, name in zip(tars, names_of(tars), strict=True):
        yield from _read_tar(tar, name, source, options, seen)


def _read_tar(
    tar: Path, tar_name: str, source: str, options: Options, seen: set[str]
) -> Iterator[Draft]:
    for name, group in groupby(members(tar), key=_group_name):
        key = f"{tar_name}/{name}"
        if key in seen:
            reason = "these members do not follow the others of their name in the tar"
            yield refused(source, f"{key} (again)", reason)
            list(group)
            continue
        found = list(group)
        seen.add(key)
        yield partial(_document, name, found, options, source, key)


def _document(
    name: str, found: list[Member], options: Options, source: str, key: str
) -> Document | Refusal:
    try:
        return Document(tuple(_parts(_sorted(name, found), options)), source, key)
    except DocumentError as error:
        return Refusal(source, key, str(error))


def _group_name(member: Member) -> str:
    """The name up to the first dot of its last piece, as WebDataset groups."""
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    return folder + slash + (name.partition(".")[0] or name)


def _ending(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _sorted(name: str, found: list[Member]) -> _Group:
    group, endings = _Group(name), set[str]()
    for member in found:
        if member.fault and member.name == name:  # the key says it already
            raise DocumentError(member.fault)
        if member.fault:
            raise DocumentError(f"{shown(member.name)}: {member.fault}")
        ending = _ending(member.name)
        if ending in endings:
            raise DocumentError(f"{shown(member.name)} stands in the tar twice")
        endings.add(ending)
        last = f".{ending.rpartition('.')[2]}"
        if last in captions.EXTENSIONS:
            group.images[member.name] = member.data
        elif last in video.EXTENSIONS:
            group.clips[member.name] = member.data
        elif ending in TEXTS:
            group.texts[ending] = member.data
        elif ending == "json":
            group.sidecar = member.data
        elif variant := _variant(member.name):
            group.variants[variant] = member.data
        else:
            group.others.append(ending)
    _check_names(group)
    return group


def _variant(name: str) -> str:
    """The name of a text: `alt` of `0001.alt.txt`, nothing where the member is no such text."""
    rest = name.rpartition("/")[2].partition(".")[2]
    return rest[: -len(".txt")] if rest.lower().endswith(".txt") else ""


def _check_names(group: _Group) -> None:
    """Refuse `1.5.jpg` with `1.5.txt`: two names with a dot, not an image 1 and its text `5`."""
    for name in (*group.images, *group.clips):
        stem, _, last = _ending(name).rpartition(".")
        if stem and stem in (variant.lower() for variant in group.variants):
            raise DocumentError(
                f"{stem}.txt and {stem}.{last}: names end at the first dot, so it is not clear "
                "which images the text is of"
            )


def _parts(group: _Group, options: Options) -> Iterator[Part]:
    record = {} if group.sidecar is None else _record(group.sidecar)
    layouts = [name for name in layouts_of(record) if name != "columns"]
    if layouts:
        if named := _captions(group):
            raise DocumentError(f"both a caption ({', '.join(named)}) and a record (json)")
        if len(layouts) > 1:
            raise DocumentError(f"the json can be {' or '.join(layouts)}")
        media = Media(Path(), options.frames, _by_names(group))
        yield from LAYOUTS[layouts[0]].parts(_with_members(record, group, layouts[0]), media)
        return
    if record.keys() == {"key", "source", "parts"}:
        raise DocumentError("a shard of this project already: give it to a recipe as it is")
    if not group.images and not group.clips:
        raise DocumentError(f"no image or clip beside {_seen(group)}")
    caption, variants = _caption(group, record), _variants(group, record)
    if caption is None and not variants:
        raise DocumentError(f"no caption beside {_seen(group)}")
    media = Media(Path(), options.frames, {})
    for name, data in group.images.items():
        yield media.image({"bytes": data, "path": name})
    for name, data in group.clips.items():
        yield from media.clip({"bytes": data, "path": name})
    yield text_of(caption, variants)


def _record(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DocumentError(f"the json is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"the json is {not_json(error)}") from error
    if not isinstance(record, dict):
        raise DocumentError(f"the json must be an object, not {type(record).__name__}")
    return record


def _caption(group: _Group, record: dict[str, Any]) -> str | None:
    """The text that has no name of its own; None where named ones must do."""
    if len(group.texts) > 1:
        raise DocumentError(
            f"several captions: {', '.join(group.texts)}; give them names (alt.txt, synthetic.txt)"
        )
    for ending, data in group.texts.items():
        return _decoded(data, ending)
    said = next((record[name] for name in CAPTIONS if record.get(name) is not None), None)
    if said is None:
        return None
    if not isinstance(said, str) or not said.strip():
        raise DocumentError(f"the caption in the json must be a text, not {shown(repr(said))}")
    return said.strip()


def _variants(group: _Group, record: dict[str, Any]) -> dict[str, str]:
    """The named texts: those that are members, in the order of the tar, then those of the json."""
    found = {name: _decoded(data, f"{name}.txt") for name, data in group.variants.items()}
    for name, words in read_variants(record).items():
        if found.setdefault(name, words) != words:
            raise DocumentError(f"the text {shown(repr(name))} in {name}.txt and json differ")
    return found


def _decoded(data: bytes, ending: str) -> str:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DocumentError(f"the {ending} is not UTF-8 (byte {error.start})") from error
    if not text:
        raise DocumentError(f"the {ending} is empty")
    return text


def _captions(group: _Group) -> list[str]:
    return [*group.texts, *(f"{name}.txt" for name in group.variants)]


def _seen(group: _Group) -> str:
    names = [_ending(name) for name in (*group.images, *group.clips)]
    names += [*_captions(group), *(["json"] if group.sidecar is not None else []), *group.others]
    return ", ".join(name or "(no ending)" for name in names) or "nothing"


def _by_names(group: _Group) -> dict[str, bytes]:
    """The members by each name that a record may call them: whole, without folder, ending."""
    named: dict[str, bytes] = {}
    for name, data in (*group.images.items(), *group.clips.items()):
        for short in (name, name.rpartition("/")[2], _ending(name)):
            named.setdefault(short, data)
    return named


def _with_members(record: dict[str, Any], group: _Group, layout: str) -> dict[str, Any]:
    """The record with its members in `images` and `videos` where it names none of its own.

    One name that no member has, and one member, are the same image: records keep the names that
    files had before they were put into the tar.
    """
    if layout in ("interleaved", "mmc4"):
        return record
    named, filled = _by_names(group), dict(record)
    for one, many, own in (("image", "images", group.images), ("video", "videos", group.clips)):
        values = listed(record, one, many)
        unknown = [value for value in values if isinstance(value, str) and value not in named]
        if not values or (len(values) == len(own) == len(unknown) == 1):
            filled.pop(one, None)
            filled[many] = [{"bytes": data, "path": name} for name, data in own.items()]
    return filled
