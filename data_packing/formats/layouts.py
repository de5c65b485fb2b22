"""The layouts of a record: which columns it has, and how they become the parts of a document.

A record is a row of any file that has rows (JSON, JSON lines, parquet, Arrow), or the sidecar of a
pair in a tar. A layout does not know which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_packing.document import DocumentError, Part
from data_packing.formats.common import shown
from data_packing.formats.conversation import Turn, converse, listed, pair, read_turns, say
from data_packing.formats.media import Media
from data_packing.formats.pages import mmc4_parts, obelics_parts
from data_packing.formats.variants import COLUMN, has_variants, read_variants, text_of

Record = dict[str, Any]
CAPTIONS = ("caption", "text", "txt")


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write a record.

    Attributes:
        needs: its columns, in words.
        fits: whether a record is written so.
        parts: the parts of the document; a DocumentError says why there are none.
        also: other layouts whose records it reads too.
    """

    needs: str
    fits: Callable[[Record], bool]
    parts: Callable[[Record, Media], Iterable[Part]]
    also: tuple[str, ...] = ()


def _conversations(record: Record, media: Media) -> list[Part]:
    turns = read_turns(record.get("conversations"), "conversations")
    return converse([*_system(record), *turns], record, media)


def _messages(record: Record, media: Media) -> list[Part]:
    turns = read_turns(record.get("messages"), "messages")
    return converse([*_system(record), *turns], record, media)


def _swift(record: Record, media: Media) -> list[Part]:
    if record.get("messages") is not None:
        turns = read_turns(record["messages"], "messages")
        return converse([*_system(record), *turns], record, media, leading=True)
    return _asked(record, media, record.get("query") or "", record.get("response"))


def _alpaca(record: Record, media: Media) -> list[Part]:
    asked = [record.get("instruction"), record.get("input")]
    for text in asked:
        if not isinstance(text, str | None):
            raise DocumentError(f"the instruction must be a text, not {shown(repr(text))}")
    return _asked(record, media, "\n".join(text for text in asked if text), record.get("output"))


def _asked(record: Record, media: Media, asked: Any, answered: Any) -> list[Part]:
    turns = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DocumentError(f'"history" must be a list of pairs, not {shown(repr(history))}')
    for number, earlier in enumerate(history, start=1):
        if not isinstance(earlier, list) or len(earlier) != 2:
            raise DocumentError(f'"history" {number} must be a pair, not {shown(repr(earlier))}')
        turns += pair(earlier[0], earlier[1], f'"history" {number}')
    return converse([*turns, *pair(asked, answered, "the pair")], record, media, leading=True)


def _finevision(record: Record, media: Media) -> list[Part]:
    pairs = record.get("texts")
    if not isinstance(pairs, list) or not pairs:
        raise DocumentError('no "texts"')
    turns = _system(record)
    for number, item in enumerate(pairs, start=1):
        if not isinstance(item, dict):
            raise DocumentError(f"pair {number} has no user and assistant: {shown(repr(item))}")
        turns += pair(item.get("user"), item.get("assistant"), f"pair {number}")
    return converse(turns, record, media, leading=True)


def _columns(record: Record, media: Media) -> Iterator[Part]:
    images, clips = listed(record, "image", "images"), listed(record, "video", "videos")
    if not images and not clips:
        raise DocumentError("no image")
    caption, variants = _caption(record), read_variants(record)
    if caption is None and not variants:
        raise DocumentError(f"no caption (looked for {', '.join((*CAPTIONS, COLUMN))})")
    yield from map(media.image, images)
    for number, clip in enumerate(clips, start=1):
        yield from media.clip(clip, number=number)
    yield text_of(caption, variants)


def _caption(record: Record) -> str | None:
    name = next((name for name in CAPTIONS if record.get(name) is not None), None)
    if name is None:
        return None
    text = record[name]
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str):
        raise DocumentError(f'"{name}" must be one text, not {shown(repr(text))}')
    if not text.strip():
        raise DocumentError(f'"{name}" is empty')
    return text.strip()


def _system(record: Record) -> list[Turn]:
    system = record.get("system")
    if not isinstance(system, str | None):
        raise DocumentError(f'"system" must be a text, not {shown(repr(system))}')
    return [say("system", system)] if system and system.strip() else []


def _has(*columns: str) -> Callable[[Record], bool]:
    return lambda record: all(record.get(column) is not None for column in columns)


def _is_sharegpt(record: Record) -> bool:
    more = ("images", "videos", "system", "tools")
    return _listed(record.get("conversations")) and any(name in record for name in more)


def _is_llava(record: Record) -> bool:
    return _listed(record.get("conversations")) and not _is_sharegpt(record)


def _first_text(record: Record) -> Any:
    """The first text of a page that is not null; `...` where there is no list of texts."""
    texts = record.get("texts")
    if not isinstance(texts, list):
        return ...
    return next((text for text in texts if text is not None), None)


def _listed(value: Any) -> bool:
    return isinstance(value, list)


def _is_page(record: Record) -> bool:
    is_text = isinstance(_first_text(record), str | None)
    return is_text and bool(record["texts"]) and _listed(record.get("images"))


def _is_caption(record: Record) -> bool:
    media = ("image", "images", "video", "videos")
    has_text = has_variants(record) or any(name in record for name in CAPTIONS)
    return has_text and any(record.get(name) is not None for name in media)


LAYOUTS: dict[str, Layout] = {
    "llava": Layout('"conversations"', _is_llava, _conversations, also=("sharegpt",)),
    "sharegpt": Layout(
        '"conversations" with "images", "videos", "system" or "tools"',
        _is_sharegpt,
        _conversations,
        also=("llava",),
    ),
    "messages": Layout('"messages"', lambda record: _listed(record.get("messages")), _messages),
    "swift": Layout(
        '"query" and "response"', _has("query", "response"), _swift, also=("messages",)
    ),
    "alpaca": Layout('"instruction" and "output"', _has("instruction", "output"), _alpaca),
    "finevision": Layout(
        '"texts" of {user, assistant}, and "images"',
        lambda record: isinstance(_first_text(record), dict),
        _finevision,
    ),
    "interleaved": Layout('parallel lists "texts" and "images"', _is_page, obelics_parts),
    "mmc4": Layout('"text_list" and "image_info"', _has("text_list", "image_info"), mmc4_parts),
    "columns": Layout(
        '"image", and "caption" (or "text") or a mapping "texts"', _is_caption, _columns
    ),
}
"""Every layout by its name."""


def layouts_of(record: Record) -> list[str]:
    """The layouts that a record fits; more than one when it could be read in two ways.

    `columns` is said only where nothing else fits: a conversation may have a caption beside it.
    """
    fitting = [name for name, layout in LAYOUTS.items() if layout.fits(record)]
    return [name for name in fitting if name != "columns"] or fitting
