"""The preview as one HTML file: no network, no script, light and dark, readable on a phone."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from data_packing.ledger import Ledger, Refusal
from data_packing.preview import Preview, ShownDocument, ShownImage, ShownPack, Token
from data_packing.wording import counted

__all__ = ["page"]

COLOURS = 8
SHOWN_REASONS = 200
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(preview: Preview) -> str:
    """Return the page; texts and keys may be anything."""
    style = files("data_packing").joinpath("preview.css").read_text(encoding="utf-8")
    title = f"Preview of {preview.title}"
    sections = [
        _head(preview, title),
        _rows(preview),
        _packs(preview),
        _left_out(preview.ledger),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


# -- the head ------------------------------------------------------------------------------------


def _head(preview: Preview, title: str) -> str:
    facts, packs = preview.facts, preview.packs
    shown = sum(pack.tokens for pack in packs)
    learned = sum(pack.learned for pack in packs)
    documents = sum(len(pack.documents) for pack in packs)
    tiles = [
        _tile("Run", f"{facts['steps']:,}", "steps", counted(facts["packs"], "pack")),
        _tile(
            "Fill",
            f"{100 * facts['efficiency']:.1f} %",
            "",
            f"{facts['tokens']:,} tokens in packs of {preview.capacity:,}",
        ),
        _tile(
            "Documents",
            f"{facts['used']:,}",
            "used",
            f"{facts['split']:,} split, {facts['refused']:,} refused, "
            f"{facts['unreached']:,} not reached",
        ),
        _tile(
            "Shown here",
            f"{len(packs):,}",
            "packs",
            f"{_steps(packs)}: {counted(documents, 'document')}, {shown:,} tokens, "
            f"{learned:,} learned ({_percent(learned, shown)})",
        ),
    ]
    return (
        f"<h1>{escape(title)}</h1>"
        '<p class="lead">The packs of the plan as the model will see them: every token, what is '
        "learned, and every image where it stands.</p>"
        f'<p class="note">Plan <code>{escape(str(facts["hash"])[:16])}</code></p>'
        '<nav aria-label="Parts of this page"><a href="#rows">Rows</a> '
        '<a href="#packs">Packs</a> <a href="#left-out">What was cut or refused</a></nav>'
        f'<div class="grid-4">{"".join(tiles)}</div>'
    )


def _tile(name: str, value: str, unit: str, note: str) -> str:
    return (
        f'<section class="card tile"><h3>{name}</h3>'
        f'<div class="value">{value} <small>{unit}</small></div>'
        f'<p class="note">{note}</p></section>'
    )


def _steps(packs: Sequence[ShownPack]) -> str:
    first, last = packs[0].step, packs[-1].step
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


# -- rows ----------------------------------------------------------------------------------------


def _rows(preview: Preview) -> str:
    parts = []
    for step, packs in groupby(preview.packs, key=lambda pack: pack.step):
        parts.append(f'<h3 class="step">Step {step:,}</h3>')
        parts += [
            f'<a class="row" href="#pack-{pack.number}"><span>pack {pack.number + 1:,}</span>'
            f"{_bar(pack, preview.capacity)}"
            f"<span>{_percent(pack.tokens, preview.capacity)}</span></a>"
            for pack in packs
        ]
    return (
        '<h2 id="rows">Rows</h2>'
        '<p class="note">One row per pack, one colour per document. Solid: learned. Pale: read, '
        "not learned. Striped: an image. Empty: room that is left.</p>"
        f'<div class="card rows">{"".join(parts)}</div>'
    )


def _bar(pack: ShownPack, capacity: int) -> str:
    segments = []
    for number, document in enumerate(pack.documents):
        runs = "".join(
            f'<i class="{kind}" style="flex:{length}"></i>' for kind, length in _runs(document)
        )
        segments.append(
            f'<b class="{_colour(number)}" style="flex:{len(document.tokens)}">{runs}</b>'
        )
    if (rest := capacity - pack.tokens) > 0:
        segments.append(f'<b class="rest" style="flex:{rest}"></b>')
    return f'<span class="bar" aria-hidden="true">{"".join(segments)}</span>'


def _runs(document: ShownDocument) -> list[tuple[str, int]]:
    """(class, length) of the stretches of a document: i image, l learned, u unlearned."""
    kinds = ["l" if learned else "u" for learned in document.learned.tolist()]
    for image in document.images:
        kinds[image.start : image.start + image.length] = ["i"] * image.length
    return [(kind, len(list(run))) for kind, run in groupby(kinds)]


def _colour(number: int) -> str:
    return f"c{number % COLOURS}"


# -- packs ---------------------------------------------------------------------------------------


def _packs(preview: Preview) -> str:
    parts = []
    for step, packs in groupby(preview.packs, key=lambda pack: pack.step):
        parts.append(f'<h3 class="step" id="step-{step}">Step {step:,}</h3>')
        parts += [_pack(pack, preview.capacity) for pack in packs]
    return (
        '<h2 id="packs">Packs</h2>'
        '<p class="note legend c0"><span class="l"><i>learned</i></span> '
        '<span class="u"><i>read, not learned</i></span> '
        '<span class="u"><i class="s">&lt;special&gt;</i></span> ↵ line end '
        "⋅ token inside a character</p>" + "".join(parts)
    )


def _pack(pack: ShownPack, capacity: int) -> str:
    images = sum(len(document.images) for document in pack.documents)
    facts = [
        f"{pack.tokens:,} of {capacity:,} tokens ({_percent(pack.tokens, capacity)})",
        _plural(len(pack.documents), "document"),
        f"{pack.learned:,} learned",
        f"{_plural(images, 'image')}, {_plural(pack.patches, 'patch', 'patches')}",
    ]
    documents = "".join(
        _document(document, number) for number, document in enumerate(pack.documents)
    )
    return (
        f'<details class="card pack" id="pack-{pack.number}" open><summary>'
        f"<strong>Pack {pack.number + 1:,}</strong> "
        f'<span class="note">{" · ".join(facts)}</span></summary>'
        f"{_bar(pack, capacity)}{_failed(pack.refused)}{documents}</details>"
    )


def _failed(refused: Sequence[Refusal]) -> str:
    """Documents that were planned for this pack and cannot be read."""
    return "".join(
        f'<p class="failed"><strong>left out</strong> <code>{escape(item.source)}</code> '
        f"{escape(item.key)}: {escape(item.reason)}</p>"
        for item in refused
    )


def _document(document: ShownDocument, number: int) -> str:
    facts = [
        f"<code>{escape(document.source)}</code>",
        f"<bdi>{escape(document.key)}</bdi>",
        escape(document.slice),
        f"{_plural(len(document.tokens), 'token')}",
        f"{int(document.learned.sum()):,} learned",
    ]
    return (
        f'<article class="document {_colour(number)}">'
        f'<p class="note">{" · ".join(fact for fact in facts if fact)}</p>'
        f'<div class="text" dir="auto">{"".join(_text(document))}</div></article>'
    )


def _text(document: ShownDocument) -> Iterator[str]:
    """The document in its order: runs of tokens, and images."""
    at = 0
    images = iter(document.images)
    for kind, length in _runs(document):
        stop = at + length
        if kind == "i":
            while at < stop:  # images may touch
                image = next(images)
                yield _image(image)
                at += image.length
            continue
        tokens = "".join(_token(token) for token in document.tokens[at:stop])
        yield f'<span class="{kind}">{tokens}</span>'
        at = stop


def _image(image: ShownImage) -> str:
    rows, columns = image.grid
    tokens = f"{_plural(image.length, 'token')}, {rows}×{columns}"
    size = f"{image.width:,}×{image.height:,} px"
    views = "".join(
        f'<img src="{escape(view, quote=True)}" loading="lazy" alt="image of {size}, {tokens}">'
        for view in image.pictures
    )
    return f'<span class="image">{views}<small>{tokens}<br>{size}</small></span>'


def _token(token: Token) -> str:
    if not token.text:
        return '<i class="e">⋅</i>'
    return f"<i{' class=s' if token.special else ''}>{escape(_visible(token.text))}</i>"


def _visible(text: str) -> str:
    """Line ends marked, and other control characters as a sign that can be seen."""
    return "".join(
        "↵\n" if letter == "\n" else _sign(letter) if _hidden(letter) else letter for letter in text
    )


def _hidden(letter: str) -> bool:
    return letter != "\t" and unicodedata.category(letter) in ("Cc", "Cf", "Cs")


def _sign(letter: str) -> str:
    return chr(0x2400 + ord(letter)) if ord(letter) < 32 else f"[U+{ord(letter):04X}]"


# -- what is not there ---------------------------------------------------------------------------


def _left_out(ledger: Ledger) -> str:
    names = ("read", "used", "split", "refused", "unreached")
    head = "".join(f"<th class=number>{name}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{escape(source)}</td>"
        + "".join(f"<td class=number>{getattr(counts, name):,}</td>" for name in names)
        + "</tr>"
        for source, counts in ledger.counts.items()
    )
    return (
        '<h2 id="left-out">What was cut or refused</h2>'
        '<p class="note">Of the whole run, before images are decoded. A document that is split is '
        "used in slices; one not reached is usable, and the run ends before it.</p>"
        f'<div class="scroll" tabindex="0"><table><thead><tr><th>source</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        + _reasons("Refused", ledger.refused)
        + _reasons("Split", ledger.split)
    )


def _reasons(title: str, items: Sequence[Refusal]) -> str:
    if not items:
        return f'<p class="note">{title}: none.</p>'
    rows = "".join(
        f"<tr><td>{escape(item.source)}</td><td><bdi>{escape(item.key)}</bdi></td>"
        f"<td>{escape(item.reason)}</td></tr>"
        for item in items[:SHOWN_REASONS]
    )
    more = len(items) - SHOWN_REASONS
    rest = (
        f'<p class="note">… and {more:,} more in the run\'s ledger.jsonl.</p>' if more > 0 else ""
    )
    return (
        f"<details><summary>{title}: {len(items):,}</summary>"
        '<div class="scroll" tabindex="0"><table class="reasons"><thead><tr><th>source</th>'
        f"<th>key</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table></div>{rest}</details>"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}\N{NO-BREAK SPACE}%" if whole else "–"


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
