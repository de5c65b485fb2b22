"""Tux Paint stamps: photographs and drawings with a sentence each, in many languages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from scripts.quickstart.archive import members
from scripts.quickstart.captions import Picture, held_out, kept, shrunk, write_pictures
from scripts.quickstart.console import Advance, warn

__all__ = ["build", "pictures", "stem_of"]

LEFT_OUT = ("symbols",)
"""Collections of letters, digits and signs: their captions say little about the picture."""

LANGUAGES = ("fr", "de", "es")
SVG_SIDE = 384
_TRANSLATION = re.compile(r"^([A-Za-z_@]+)\.utf8=(.+)$")
_ROOT = "usr/share/tuxpaint/stamps"


def build(package: Path, fraction: float, folder: Path, advance: Advance) -> dict[str, Any]:
    """Write the stamps' pictures of both splits to `folder`; returns counts."""
    total, seen = package.stat().st_size, 0
    texts: dict[str, str] = {}
    images: dict[str, bytes] = {}
    for path, content in members(package):
        if path.suffix in (".txt", ".png", ".svg") and (stem := stem_of(path)) is not None:
            if not kept(stem, fraction):
                continue
            data = content.read()
            seen += len(data)
            if path.suffix == ".txt":
                texts[stem] = data.decode("utf-8", errors="replace")
            elif path.suffix == ".png" or stem not in images:
                images[stem] = data
            advance(seen, 0)
    stats = {"without image": 0, "drawings left out": 0}
    written = write_pictures(folder, pictures(texts, images, stats))
    advance(total, total)
    if (left_out := stats["drawings left out"]) and _renderer() is None:
        warn(
            f"{left_out} stamps are SVG drawings and were left out: rendering them needs the "
            "system's cairo library (sudo apt-get install libcairo2)"
        )
    hidden = sum(picture.held_out for picture in written)
    return {"pictures": len(written), "train": len(written) - hidden, "held out": hidden, **stats}


def stem_of(path: PurePosixPath) -> str | None:
    """The name of a stamp's files without their endings; None for what is no stamp we use."""
    text = str(path.with_suffix(""))
    if not text.startswith(f"{_ROOT}/"):
        return None
    stem = text.removeprefix(f"{_ROOT}/")
    return None if stem.split("/")[0] in LEFT_OUT else stem


def pictures(
    texts: dict[str, str], images: dict[str, bytes], stats: dict[str, int]
) -> Iterator[tuple[Picture, bytes]]:
    """Pair captions with images; counts what could not be used in `stats`."""
    for stem, text in sorted(texts.items()):
        first, *others = text.split("\n")
        if not (caption := first.strip()):
            continue
        if stem not in images:
            stats["without image"] += 1
            continue
        data = _png(images[stem])
        if data is None:
            stats["drawings left out"] += 1
            continue
        key = "stamps-" + re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
        picture = Picture(
            key=key,
            source="stamps",
            caption=caption,
            file=f"{key}.{'jpg' if data[:2] == bytes([0xFF, 0xD8]) else 'png'}",
            group=stem.split("/")[0],
            names=_translations(others),
            creator="Tux Paint stamps contributors",
            licence="GPL-2",
            held_out=held_out(caption),
        )
        yield picture, data


def _translations(lines: Iterable[str]) -> dict[str, str]:
    found = (match for line in lines if (match := _TRANSLATION.match(line)))
    return {m[1]: m[2].strip() for m in found if m[1] in LANGUAGES and m[2].strip()}


def _png(data: bytes) -> bytes | None:
    """A picture's bytes, drawings rendered; None if this machine cannot render them."""
    if data[:4] == b"\x89PNG" or data[:2] == b"\xff\xd8":
        return shrunk(data)
    if (render := _renderer()) is None:
        return None
    try:
        rendered: bytes = render(bytestring=data, output_width=SVG_SIDE)
    except Exception:  # a drawing that cairosvg cannot read must not end the run; it is counted
        return None
    return shrunk(rendered)


def _renderer() -> Callable[..., bytes] | None:
    """cairosvg's svg2png; None if it, or the system library it needs, is missing."""
    try:
        import cairosvg
    except (ImportError, OSError):  # OSError: the binding is there, the system's library is not
        return None
    render: Callable[..., bytes] = cairosvg.svg2png
    return render
