from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packing_toys import captions, cost, encoded, image, image_cost, page
from PIL import Image as PillowImage
from rich.console import Console

from data_packing.document import Document, DocumentError, Image, Text
from data_packing.executors import Executor
from data_packing.index import build_index
from data_packing.info import (
    CHARACTERS,
    HEIGHT,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    Facts,
    Spread,
    general,
    kind_of,
    survey,
    together,
)
from data_packing.ledger import Refusal
from data_packing.sample import Cost
from data_packing.scan import Rules, find_sources
from data_packing.sharding import write_shards
from data_packing.tables import bars, info_tables


def choosy(document: Document) -> Cost:
    if document.key == "k1":
        raise DocumentError("the template refuses turn 7")
    return cost(document)


def no_special(text: str) -> str | None:
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources, the first in two shards."""
    photo = Image.from_bytes(encoded(PillowImage.new("RGB", (30, 20)), "JPEG"))
    documents = [
        *captions(3),
        Document.caption(photo, "ein schönes Bild", "toys", "photo"),
        Document((Image(b"odd", 8, 9), Text("Привет")), "toys", "odd"),
        Refusal("raw", "r1", "image a.png: broken PNG: 12 bytes"),
        Refusal("raw", "r2", "image b.jpg: broken PNG: 7 bytes"),
    ]
    write_shards(documents, tmp_path, "toys", 3)
    talk = Document.conversation([("user", [image(), "who?"]), ("assistant", "me")], "t", "talk")
    write_shards([talk, page([5, 5], "text"), page([4], "one", True)], tmp_path, "talks")
    return tmp_path


def test_counts_of_each_source_and_of_all(folder: Path) -> None:
    facts = survey(find_sources([str(folder)]))
    toys, talks = facts["toys"], facts["talks"]
    assert (toys.shards, toys.documents, toys.images) == (3, 5, 5)
    assert (talks.documents, talks.images, talks.texts, talks.learned_texts) == (3, 2, 5, 4)
    assert talks.kinds == {"conversations": 1, "texts": 1, "captions": 1}
    assert toys.formats == {"PNG": 3, "JPEG": 1, "unreadable": 1}
    assert toys.refused == {"image …: broken PNG: … bytes": 2}
    assert toys.scripts["Cyrillic"] == 6
    assert toys.bytes == sum(path.stat().st_size for path in folder.glob("toys*.tar"))
    spreads = toys.spreads()
    assert (spreads[HEIGHT].least, spreads[HEIGHT].most) == (8, 20)
    assert (spreads[WIDTH].least, spreads[WIDTH].most) == (9, 30)
    assert spreads[CHARACTERS].count == 5
    everything = together(facts)
    assert (everything.documents, everything.shards) == (8, 4)
    assert everything.kinds.total() == 8
    assert toys.documents == 5


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        (Document.caption(image(), "a"), "captions"),
        (Document((image(), Text("a"), Text("b"))), "captions"),
        (Document((Text("a"), image())), "pages"),
        (Document((image(),)), "pages"),
        (Document((image(), image(), Text("a"))), "pages"),
        (Document((Text("a"),)), "texts"),
        (Document.conversation([("user", "a"), ("assistant", "b")]), "conversations"),
    ],
)
def test_kinds(document: Document, kind: str) -> None:
    assert kind_of(document) == kind


def test_a_spread_counts_doubling_bins() -> None:
    spread = Spread.of(np.array([0, 1, 2, 3, 4, 8, 8]))
    assert spread is not None
    assert spread.bins == ((0, 1, 1), (1, 2, 1), (2, 4, 2), (4, 8, 1), (8, 16, 2))
    assert (spread.least, spread.median, spread.most, spread.total) == (0, 3, 8, 26)
    assert bars(spread, 0) == "▅▅█▅█"
    shifted = Spread.of(np.array([4, 4, 5, 64]))
    assert shifted is not None
    assert shifted.bins[0] == (4, 8, 3)
    assert bars(shifted, 1) == "  █   ▃"
    assert Spread.of(np.array([], dtype=np.int64)) is None


def test_reasons_lose_what_is_particular() -> None:
    assert general("image 3: broken 'x y'") == general("image 4: broken 'z'")
    assert general("no text") != general("no image")


def test_frames_that_a_clip_goes_without_take_no_tokens(tmp_path: Path) -> None:
    frames = [replace(image(), clip=1) for _ in range(3)]
    write_shards([Document((*frames, Text("abc")), "toys", "k")], tmp_path, "toys")
    rules = Rules(lambda document: Cost(1, ((3, (1,)),)), image_cost, no_special)
    spread = survey(find_sources([str(tmp_path)]), rules)["toys"].spreads()[TOKENS]
    assert spread.total == 1 + 3 + image_cost(8, 9)[0]


def test_a_cache_counts_only_where_it_fits_every_shard(folder: Path) -> None:
    paths = find_sources([str(folder)])["toys"]
    build_index(paths, cost, "toy")
    (name,) = (key for key in survey({"toys": paths})["toys"].spreads() if "tokens" in key)
    assert name.startswith(TEXT_TOKENS)
    spread = survey({"toys": paths})["toys"].spreads()[name]
    assert spread.count == 5
    assert (
        spread.total
        == sum(
            cost(each).overhead + sum(text for text, _ in cost(each).pieces)
            for each in [*captions(3)]
        )
        + len("ein schönes Bild")
        + len("Привет")
        + 2
    )
    next(folder.glob("toys-000000.tokens-*")).write_bytes(b"damaged")
    assert not any("tokens" in key for key in survey({"toys": paths})["toys"].spreads())


def test_a_cache_of_other_bytes_and_what_it_refused_are_not_counted(tmp_path: Path) -> None:
    paths = write_shards(captions(3), tmp_path, "toys").paths
    build_index(paths, choosy, "toy")
    (cache,) = tmp_path.glob("toys-000000.tokens-*")
    (count,) = (
        s.count for name, s in survey({"toys": paths})["toys"].spreads().items() if "tokens" in name
    )
    assert count == 2  # without k1
    old = cache.read_bytes()
    write_shards(captions(3, start=10), tmp_path, "toys")
    cache.write_bytes(old)
    assert not any("tokens" in key for key in survey({"toys": paths})["toys"].spreads())


def test_a_model_counts_images_too_and_what_it_refuses_is_told(tmp_path: Path) -> None:
    write_shards(captions(4), tmp_path, "toys")
    facts = survey(find_sources([str(tmp_path)]), Rules(choosy, image_cost, no_special))["toys"]
    spreads = facts.spreads()
    assert spreads[TOKENS].count == 3
    assert spreads[TOKENS].total == spreads[TEXT_TOKENS].total + 3 * 4
    assert facts.refused == {"by the model: the template refuses turn …": 1}
    assert not list(tmp_path.glob("*.tokens-*"))


def test_workers_count_the_same(tmp_path: Path) -> None:
    write_shards(captions(150), tmp_path, "toys", 100)
    sources = find_sources([str(tmp_path)])
    rules = Rules(choosy, image_cost, no_special)
    alone, many = (
        survey(sources, rules, Executor("local", workers))["toys"].to_json() for workers in (0, 2)
    )
    assert alone == many
    assert json.loads(json.dumps(alone))["documents"] == 150


def test_a_document_with_damaged_bytes_is_counted(tmp_path: Path) -> None:
    path = write_shards(captions(2), tmp_path, "toys").paths[0]
    data = bytearray(path.read_bytes())
    data[:5] = b"\xff" * 5
    path.write_bytes(data)
    facts = survey(find_sources([str(tmp_path)]))["toys"]
    assert (facts.documents, facts.unreadable, facts.images) == (2, 1, 1)


def test_the_tables_fit_80_columns(folder: Path) -> None:
    facts = survey(find_sources([str(folder)]))
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(info_tables(facts))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("toys", "talks", "all", "5 PNG, 1 JPEG", "Cyrillic", "image …: broken PNG"):
        assert words in text, words
    alone = Console(file=io.StringIO(), record=True, width=80)
    alone.print(info_tables({"toys": facts["toys"]}))
    assert "all" not in alone.export_text().split()


def test_no_shard_of_nothing_breaks_the_tables() -> None:
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(info_tables({"empty": Facts()}))
    assert "empty" in console.export_text()


def test_variants_are_counted_by_name_where_there_are_any(folder: Path) -> None:
    named = [
        Document((image(), Text("a", variants=(("alt", "b"), *more))), "toys", f"k{number}")
        for number, more in enumerate([(("de", "c"),), (), ()])
    ]
    paths = write_shards(named, folder, "named").paths
    build_index(paths, cost, "toy", text="alt")
    build_index(paths, cost, "toy", text="de")
    facts = survey(find_sources([str(folder)]))
    assert facts["named"].variants == {"alt": 3, "de": 1}
    assert facts["named"].to_json()["variants"] == {"alt": 3, "de": 1}
    assert together(facts).variants == {"alt": 3, "de": 1}
    tokens = {name: s.count for name, s in facts["named"].spreads().items() if "tokens" in name}
    assert sorted((name.split(", ")[1], count) for name, count in tokens.items()) == [
        ("alt)", 3),
        ("de)", 1),
    ]
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(info_tables(facts))
    text = console.export_text()
    assert "Text variants" in text
    assert "3 alt, 1 de" in text
    assert max(map(len, text.splitlines())) <= 80
    console.print(info_tables({"toys": facts["toys"]}))
    assert "Text variants" not in console.export_text()
