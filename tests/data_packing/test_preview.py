from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing_toys import captions, encode, image, image_cost, index_of, page, png
from PIL import Image as PillowImage

from data_packing import plan as plan_module
from data_packing.document import Document, Image, Text
from data_packing.index import Index
from data_packing.ledger import Ledger, Refusal
from data_packing.loader import Loader
from data_packing.plan import Plan
from data_packing.preview import Preview, ShownDocument, ShownPack, Token, look, picture
from data_packing.preview_page import SHOWN_REASONS
from data_packing.preview_page import page as page_of
from data_packing.sample import Sample

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "img", "br"}


def spell(ids: Sequence[int]) -> list[Token]:
    """The end, images, letters."""
    signs = {0: Token("<end>", True), 1: Token("<image>", True)}
    return [signs.get(number) or Token(chr(number - 2)) for number in ids]


def encode_learned(document: Document) -> Sample:
    """Images are not learned, and of a text only what is not `y`."""
    sample = encode(document)
    labels = sample.labels.copy()
    for slot in sample.slots:
        labels[slot.start : slot.start + slot.length] = -100
    labels[sample.input_ids == 2 + ord("y")] = -100
    return replace(sample, labels=labels)


def plan_of(index: Index, **changes: Any) -> Plan:
    options: dict[str, Any] = {
        "processor_fingerprint": "p",
        "image_cost": image_cost,
        "tokens": 128,
        "patches": 64,
        "tokens_per_step": 384,
        "seed": 0,
        "epochs": 2,
    }
    return Plan([index], [1.0], **(options | changes))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Captions, pages that are cut, one that is refused, and an image that does not decode."""
    monkeypatch.setattr(plan_module, "BLOCK", 30)
    monkeypatch.setattr(plan_module, "STEPS", 1)
    broken = Document((Image(png(16, 16)[:-60], 16, 16), Text("a" * 9)), "toys", "broken")
    pages = [page([50] * 4, f"page{number}", True) for number in range(3)]
    notes = [Document((Text("z" * 9), image()), "toys", f"note{number}") for number in range(9)]
    return index_of([*captions(30), *pages, *notes, page([300], "large"), broken], tmp_path)


def look_at(index: Index, plan: Plan | None = None, **options: Any) -> Preview:
    plan = plan or plan_of(index)
    return look(plan, encode_learned, spell, title="a recipe", **options)


@pytest.mark.parametrize("across", [False, True])
def test_the_packs_are_those_that_the_loader_gives(index: Index, across: bool) -> None:
    plan = plan_of(index, across_documents=across)
    seen = look_at(index, plan, packs=10_000)
    loader = Loader(plan, encode_learned, rank=0, world=1, workers=0)
    loaded = [(step.number + 1, pack) for step, packs in loader for pack in packs]
    assert len(seen.packs) == len(loaded) == seen.facts["packs"]
    for shown, (step, pack) in zip(seen.packs, loaded, strict=True):
        assert (shown.step, shown.number, shown.refused) == (step, pack.number, pack.refused)
        assert [document.key for document in shown.documents] == pack.keys
        learned = np.concatenate([document.learned for document in shown.documents])
        assert learned.tolist() == (pack.labels != -100).tolist()
        assert shown.learned == pack.learned
        tokens = [token for document in shown.documents for token in document.tokens]
        assert tokens == spell(pack.input_ids.tolist())
        assert sum(len(document.images) for document in shown.documents) == len(pack.sizes)
    assert {refusal.key for pack in seen.packs for refusal in pack.refused} == {"broken"}


def test_it_starts_at_a_step_and_stops_after_some_packs(index: Index) -> None:
    whole = look_at(index, packs=10_000).packs
    last = whole[-1].step
    for step in (1, 2, 5, last):
        shown = look_at(index, packs=4, step=step).packs
        expected = [pack for pack in whole if pack.step >= step][:4]
        assert [pack.number for pack in shown] == [pack.number for pack in expected]
        assert shown[0].step == step
    for step in (0, last + 1):
        with pytest.raises(ValueError, match=f"the run has steps 1 to {last}"):
            look_at(index, step=step)


def test_slices_say_which_pieces_they_are(index: Index) -> None:
    documents = [each for pack in look_at(index, packs=10_000).packs for each in pack.documents]
    assert {each.slice for each in documents if each.key == "page0"} == {
        "pieces 1 to 2 of 4",
        "pieces 3 to 4 of 4",
    }
    assert {each.slice for each in documents if each.key == "k1"} == {""}


def test_images_are_shown_as_the_encoder_sees_them(index: Index) -> None:
    pack = next(pack for pack in look_at(index).packs if pack.documents[0].key.startswith("k"))
    shown = pack.documents[0].images[0]
    assert (shown.start, shown.length, shown.grid, shown.height, shown.width) == (
        0,
        4,
        (2, 2),
        8,
        9,
    )
    (only,) = shown.pictures
    head, data = only.split(",")
    assert head == "data:image/jpeg;base64"
    with PillowImage.open(io.BytesIO(base64.b64decode(data))) as opened:
        assert opened.size == (4, 4)
    wide = picture(np.zeros((300, 600, 3), dtype=np.uint8))
    with PillowImage.open(io.BytesIO(base64.b64decode(wide.split(",")[1]))) as opened:
        assert opened.size == (128, 64)


def test_every_view_of_an_image_is_shown(index: Index) -> None:
    def encode_halves(document: Document) -> Sample:
        sample = encode_learned(document)
        sample.pixels = [half for view in sample.pixels for half in (view[:1], view[1:])]
        for slot in sample.slots:
            slot.views = 2
        return sample

    seen = look(plan_of(index), encode_halves, spell, title="a recipe", packs=10_000)
    images = [each for pack in seen.packs for one in pack.documents for each in one.images]
    assert {len(each.pictures) for each in images} == {2}
    heights = []
    for data in images[0].pictures:
        with PillowImage.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) as opened:
            heights.append(opened.height)
    assert heights == [1, 3]
    assert page_of(seen).count("<img ") == 2 * len(images)


class Checker(HTMLParser):
    """Checks that tags close in order, and gathers tags and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def classed(self, tag: str, name: str) -> int:
        """How many tags have a class."""
        return sum(t == tag and name in str(a.get("class")).split() for t, a in self.tags)


def test_the_page_shows_packs_steps_fill_and_what_is_left_out(index: Index) -> None:
    seen = look_at(index, packs=10_000)
    html = Checker(page_of(seen))
    documents = sum(len(pack.documents) for pack in seen.packs)
    assert html.classed("article", "document") == documents
    assert html.classed("a", "row") == html.classed("details", "pack") == len(seen.packs)
    assert html.classed("b", "rest") == 2 * sum(pack.tokens < 128 for pack in seen.packs)
    images = sum(len(each.images) for pack in seen.packs for each in pack.documents)
    assert sum(tag == "img" for tag, _ in html.tags) == images
    links = {str(a["href"])[1:] for tag, a in html.tags if tag == "a"}
    assert links <= {str(a.get("id")) for _, a in html.tags}
    for words in (
        f"Step {seen.packs[-1].step}",
        "Refused: 1",
        "toyslargepiece 1 of 1 needs 301 tokens, a pack holds 128",
        "Split: 3",
        "pieces 1 to 2 of 4",
        "left out toys broken: ",
        "4 tokens, 2×2",
    ):
        assert words in html.words, words


def test_every_token_is_there_learned_or_not() -> None:
    tokens = [Token(text) for text in ("be", "gin", " \n", "", "é", "\x07", "end")]
    tokens[-1] = Token("<|end|>", True)
    learned = np.array([False, False, True, True, True, True, False])
    document = ShownDocument("s", "k", "", tokens, learned, [])
    pack = ShownPack(0, 1, 0, [document], [])
    html = page_of(preview_of(pack))
    assert '<span class="u"><i>be</i><i>gin</i></span>' in html
    assert '<span class="l"><i> ↵\n</i><i class="e">⋅</i><i>é</i><i>␇</i></span>' in html
    assert '<span class="u"><i class=s>&lt;|end|&gt;</i></span>' in html
    bar = re.search(r'<span class="bar".*?</span>', html)
    assert bar is not None
    assert re.findall(r'class="(\w+)" style="flex:(\d+)', bar[0]) == [
        ("c0", "7"),
        ("u", "2"),
        ("l", "4"),
        ("u", "1"),
        ("rest", "3"),
    ]


def preview_of(pack: ShownPack, ledger: Ledger | None = None) -> Preview:
    names = ("steps", "packs", "tokens", "used", "split", "refused", "unreached")
    facts = dict.fromkeys(names, 1) | {"efficiency": 0.5, "hash": "abc"}
    return Preview("a recipe", facts, ledger or Ledger(), 10, [pack])


def test_long_lists_of_reasons_end() -> None:
    ledger = Ledger()
    for number in range(SHOWN_REASONS + 3):
        ledger.refuse(Refusal("s", f"key-{number}-", "why"))
    html = page_of(preview_of(ShownPack(0, 1, 0, [], []), ledger))
    assert f"key-{SHOWN_REASONS - 1}-" in html
    assert f"key-{SHOWN_REASONS}-" not in html
    assert "and 3 more" in html


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[tuple[str, list[str], Document]]:
    """A page of documents that try to fetch from a server, and what the server was asked for."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    there = f"http://127.0.0.1:{server.server_port}"
    attack = (
        f"\"'><img src={there}/img><script src={there}/script></script>"
        f"<link rel=stylesheet href={there}/css><style>@import url({there}/style)</style>&lt;"
    )
    document = Document((image(), Text(attack)), "toys", attack)
    refused = Refusal("toys", attack, attack)
    index = index_of([document, refused], tmp_path, name="toys")
    plan = plan_of(index, tokens=4096, tokens_per_step=4096, epochs=1)
    seen = look(plan, encode, spell, title=attack)
    seen.packs[0].refused.append(refused)
    yield page_of(seen), asked, document
    server.shutdown()
    server.server_close()


def test_nothing_in_a_document_becomes_html(hostile: tuple[str, list[str], Document]) -> None:
    page, _, _ = hostile
    html = Checker(page)
    assert not {tag for tag, _ in html.tags} & {"script", "link", "iframe", "object", "base"}
    assert sum(tag == "img" for tag, _ in html.tags) == 1
    for _, attributes in html.tags:
        for name in ("src", "href"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:image/"))
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it_and_asks_nobody(
    hostile: tuple[str, list[str], Document], tmp_path: Path
) -> None:
    page, asked, document = hostile
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    text = re.sub(r"<style>.*?</style>", "", done.stdout, flags=re.DOTALL)
    assert text.count("<article") == 1
    assert text.count("<img") == 1
    assert "<script" not in text
    words = "".join(re.findall(r"<i(?: class=\"\w+\")?>(.*?)</i>", text))
    assert words.startswith("learned")
    assert "&lt;script" in words
    assert asked == []
    assert document.key
