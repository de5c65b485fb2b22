"""The report as one HTML file: no network, no script, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from data_packing.wording import counted
from mllm.evaluation.chart import loss_curve
from mllm.evaluation.measure import BARS, Bar
from mllm.evaluation.wording import (
    interval_text,
    limit_text,
    loss_text,
    percent_text,
    value_text,
    whole_text,
)

__all__ = ["page"]

Report = dict[str, Any]


def page(report: Report, pictures: dict[str, str]) -> str:
    """Return the page.

    Args:
        report: what report.json holds; parts may be missing, texts may be anything.
        pictures: data URIs by the key of the example.
    """
    style = files("mllm.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    title = f"Report on {report.get('folder', 'a run')}"
    sections = [
        _head(report, title),
        _figures(report.get("figures", {})),
        _stages(report.get("stages", [])),
        _examples(report.get("examples", []), pictures),
        _details(report.get("figures", {}), report.get("gap_by_stage", {})),
        _data(report.get("data", [])),
        _made(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _head(report: Report, title: str) -> str:
    made = report.get("made", {})
    facts = [made.get("date"), made.get("machine"), f"seed {report.get('seed', '?')}"]
    stage = report.get("model")
    measured = f"Measured on the model of <code>{escape(str(stage))}</code>. " if stage else ""
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="lead">{measured}Every figure is of images and captions that no stage has '
        "seen: the held-out set is split by caption, not by image.</p>"
        f'<p class="note">{escape(" · ".join(str(fact) for fact in facts if fact))}</p>'
    )


def _figures(figures: dict[str, Any]) -> str:
    tiles = "".join(_tile(bar, figures.get(name, {})) for name, bar in BARS.items())
    return f'<div class="grid-4">{tiles}</div>'


def _tile(bar: Bar, figure: dict[str, Any]) -> str:
    if "value" not in figure:
        reason = escape(str(figure.get("reason", "not measured")))
        return (
            f'<section class="card tile"><h3>{escape(bar.title)}</h3>'
            f'<div class="value">–</div><p class="note">{reason}</p>'
            '<span class="badge">not measured</span></section>'
        )
    met = bar.met(figure["value"])
    return (
        f'<section class="card tile"><h3>{escape(bar.title)}</h3>'
        f'<div class="value">{value_text(bar, figure["value"])} <small>{bar.unit}</small></div>'
        f'<p class="note">95 % interval {interval_text(bar, figure)}</p>'
        f'<p class="note">{escape(_beside(bar, figure))}</p>'
        f'<span class="badge {"good" if met else "bad"}">{"✓" if met else "✗"} bar '
        f"{limit_text(bar)}</span></section>"
    )


def _beside(bar: Bar, figure: dict[str, Any]) -> str:
    """What the figure is made of, or what chance gives."""
    parts = figure.get("parts", {})
    if "shuffled" in parts:
        return f"own image {parts['right']:.2f}, another's {parts['shuffled']:.2f}"
    if "blank" in parts:
        return f"with image {100 * parts['right']:.0f} %, blank {100 * parts['blank']:.0f} %"
    if "before" in parts:
        return f"before {parts['before']:.2f}, after {parts['after']:.2f}"
    chance = figure.get("chance")
    return f"chance {value_text(bar, chance)} {bar.unit}" if chance is not None else ""


def _stages(stages: Sequence[dict[str, Any]]) -> str:
    charts, rows = [], []
    for stage in stages:
        name = escape(str(stage.get("name")))
        state = "" if stage.get("finished") else ' <span class="badge bad">not finished</span>'
        curve = loss_curve(stage.get("curve", []), f"Loss of {stage.get('name')}")
        charts.append(f'<section class="card"><h3>{name}{state}</h3>{curve}</section>')
        rows.append(
            [
                name,
                whole_text(stage.get("steps")),
                whole_text(stage.get("tokens")),
                whole_text(stage.get("learned")),
                _minutes(stage.get("seconds")),
                whole_text(stage.get("tokens_per_second")),
                percent_text(stage.get("wait_share")),
                f"{loss_text(stage.get('first_loss'))} → {loss_text(stage.get('last_loss'))}",
                _documents(stage.get("documents", {})),
            ]
        )
    heads = ["stage", "steps", "useful tokens", "learned", "time", "tokens/s", "loader wait"]
    return (
        "<h2>Training</h2>"
        '<p class="note">Loss in nats per learned token over useful tokens. Faint: every step; '
        "strong: running mean. Stages learn from different data, so compare within one.</p>"
        f'<div class="grid-3">{"".join(charts)}</div>'
        + _table([*heads, "loss", "documents"], rows, numbers=range(1, 8))
    )


def _examples(examples: Sequence[dict[str, Any]], pictures: dict[str, str]) -> str:
    if not examples:
        return ""
    cards = []
    for example in examples:
        said = "".join(_said(asked) for asked in example.get("asked", []))
        picture = escape(pictures.get(str(example.get("key")), ""), quote=True)
        image = f'<img src="{picture}" alt="" loading="lazy">' if picture else ""
        cards.append(
            f'<article class="card example"><div class="picture">{image}</div>'
            f'<div class="said"><dl>{said}</dl></div></article>'
        )
    return (
        "<h2>Held-out images and answers</h2>"
        '<p class="note">Drawn at random with the seed, not chosen. The likeliest answer, token by '
        "token; ✓ where it is the true one to the letter, case and punctuation aside.</p>"
        f'<div class="grid-2">{"".join(cards)}</div>'
    )


def _said(asked: dict[str, Any]) -> str:
    truth, answer = str(asked.get("truth", "")), str(asked.get("answer", ""))
    right = _plain(truth) == _plain(answer)
    mark = '<span class="yes">✓</span>' if right else '<span class="no">✗</span>'
    real = "" if right else f'<dd class="note">true: {escape(truth)}</dd>'
    return (
        f"<dt>{escape(str(asked.get('question', '')))}</dt>"
        f'<dd class="answer">{mark} {escape(answer) or "(nothing)"}</dd>{real}'
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!?")


def _details(figures: dict[str, Any], gaps: dict[str, Any]) -> str:
    rows = []
    for name, bar in BARS.items():
        figure = figures.get(name, {})
        known = "value" in figure
        chance = figure.get("chance") if known else None
        rows.append(
            [
                f'<div class="wide"><strong>{escape(bar.title)}</strong><br>'
                f"{escape(bar.meaning)}</div>",
                f"{value_text(bar, figure['value'])} {bar.unit}" if known else "–",
                interval_text(bar, figure) if known else "–",
                "–" if chance is None else f"{value_text(bar, chance)} {bar.unit}",
                limit_text(bar),
                whole_text(figure.get("trials")),
            ]
        )
    heads = ["figure", "value", "95 % interval", "chance", "bar", "trials or tokens"]
    table = _table(heads, rows, numbers=range(1, 6))
    return (
        "<h2>What the figures mean</h2>"
        '<p class="note">Intervals are bootstrap intervals over captions (2,000 resamples); all '
        "trials of a caption are drawn or left out together. For the text they are over windows "
        f"of 256 tokens.</p>{table}{_gaps(gaps)}{_parts(figures)}"
    )


def _gaps(gaps: dict[str, Any]) -> str:
    rows = [
        [
            escape(name),
            f"{gap['parts']['right']:.2f}",
            f"{gap['parts']['shuffled']:.2f}",
            value_text(BARS["caption_gap"], gap["value"]),
            interval_text(BARS["caption_gap"], gap),
        ]
        for name, gap in gaps.items()
        if "value" in gap
    ]
    if not rows:
        return ""
    heads = ["after stage", "loss, own image", "loss, another's image", "gap", "95 % interval"]
    return "<h3>Caption loss by stage</h3>" + _table(heads, rows, numbers=range(1, 5))


def _parts(figures: dict[str, Any]) -> str:
    """By source and by category: the numbers behind the figures."""
    sources = figures.get("caption_gap", {}).get("parts", {}).get("sources", {})
    text = figures.get("text", {}).get("parts", {})
    items = [
        f"{escape(name)}: gap {part['gap']:+.2f} nats over {counted(part['images'], 'image')}"
        for name, part in sources.items()
    ]
    category = figures.get("category", {}).get("parts", {})
    if category:
        items.append(
            f"categories: {len(category['categories'])} to choose from; always naming the "
            f"commonest would be right {100 * category['commonest']:.0f} % of the time"
        )
    if text:
        items.append(
            f"text: {escape(str(text.get('name')))}, sha256 "
            f"<code>{escape(str(text.get('sha256'))[:16])}…</code>"
        )
    return '<ul class="note">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _data(sources: Sequence[dict[str, Any]]) -> str:
    if not sources:
        return ""
    names = ("attribution", "licence", "use")
    rows = [
        [
            f"<code>{escape(str(source.get('package', '?')))}</code> "
            f"{escape(str(source.get('version', '')))}",
            *(escape(str(source.get(name, ""))) for name in names),
        ]
        for source in sources
    ]
    return "<h2>Data and weights</h2>" + _table(["package", *names], rows)


def _made(report: Report) -> str:
    made = report.get("made", {})
    versions = ", ".join(f"{name} {number}" for name, number in made.get("versions", {}).items())
    recipes = "".join(
        f"<details><summary>{escape(str(stage.get('name')))}: recipe and plan "
        f"{escape(str(stage.get('run', {}).get('plan', '?'))[:16])}</summary>"
        f"<pre>{escape(str(stage.get('recipe', '')))}</pre></details>"
        for stage in report.get("stages", [])
    )
    return (
        "<h2>How to make this page again</h2>"
        f"<pre>{escape(str(made.get('command', '')))}</pre>"
        f'<p class="note">{escape(str(made.get("machine", "")))}. {escape(versions)}. Seed '
        f"{escape(str(report.get('seed', '?')))}. Measured in {made.get('seconds', 0):.0f} s "
        f"({made.get('cpu_seconds', 0):.0f} CPU seconds).</p>{recipes}"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table; cells are HTML already."""

    def row(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if at in numbers else ''}>{cell}</{tag}>"
            for at, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    head = row("th", [escape(name) for name in heads])
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _documents(counts: dict[str, dict[str, int]]) -> str:
    texts = []
    for source, numbers in counts.items():
        text = f"{escape(source)} {numbers.get('used', 0):,}"
        lost = [
            f"{numbers[name]:,} {name}"
            for name in ("split", "refused", "unreached")
            if numbers.get(name)
        ]
        texts.append(text + (f" ({', '.join(lost)})" if lost else ""))
    return f'<div class="nowrap">{"<br>".join(texts) or "–"}</div>'


def _minutes(seconds: float | None) -> str:
    return "–" if seconds is None else f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
