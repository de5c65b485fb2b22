from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from packing_toys import captions, cost, encoded, image, image_cost, page, png
from PIL import Image as PillowImage
from rich.console import Console

from data_packing.document import Document, DocumentError, Image, Text
from data_packing.executors import Executor
from data_packing.ledger import Refusal
from data_packing.lint import ERRORS, WARNINGS, Report, content_hash, lint, summary
from data_packing.sample import Cost
from data_packing.scan import Rules, find_sources
from data_packing.shard_file import DUPLICATE
from data_packing.sharding import write_shards
from data_packing.shards import index_path
from data_packing.tables import lint_tables, verdict


def special(text: str) -> str | None:
    return "<end>" if "<end>" in text else None


def strict_cost(document: Document) -> Cost:
    if document.key in ("refused", "special"):
        raise DocumentError("the template refuses it")
    return cost(document)


RULES = Rules(strict_cost, image_cost, special)


def found_in(folder: Path, **options: object) -> list[tuple[str, str]]:
    report = lint(find_sources([str(folder)]), **options)  # type: ignore[arg-type]
    return [(defect.kind, defect.key) for defect in report.defects]


def shards_of(
    documents: Iterable[Document | Refusal], folder: Path, per_shard: int = 100
) -> list[Path]:
    return write_shards(documents, folder, "s", per_shard).paths


def with_image(data: bytes, key: str, height: int = 8, width: int = 9) -> Document:
    return Document((Image(data, height, width), Text("a caption")), "toys", key)


def large(key: str = "bomb") -> Document:
    """A PNG of a few bytes that claims 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)

    def block(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    data = b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", b"") + block(b"IEND", b"")
    return with_image(data, key, 20_000, 20_000)


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encoded(PillowImage.fromarray(noise), "JPEG")


def good(count: int = 3) -> list[Document]:
    return [
        Document.caption(image(16, 16, seed), f"caption {seed}", "toys", f"good{seed}")
        for seed in range(count)
    ]


def test_good_shards_are_clean(tmp_path: Path) -> None:
    shards_of(good(), tmp_path)
    report = lint(find_sources([str(tmp_path)]))
    assert report == Report(shards=1, documents=3, images=3)
    assert verdict(report) == "3 documents with 3 images in 1 shard: clean"


DOCUMENTS: list[tuple[str, Document]] = [
    ("undecodable image", with_image(png(16, 16)[:-60], "x", 16, 16)),
    ("undecodable image", with_image(jpeg()[:-900], "x", 64, 64)),
    ("undecodable image", with_image(b"no image", "x")),
    ("too many pixels", large("x")),
    ("wrong image size", with_image(png(16, 16), "x", 16, 17)),
    ("tiny image", with_image(png(9, 40), "x", 9, 40)),
    ("no learned text", Document((image(16, 16), Text("a", learned=False)), "toys", "x")),
    ("empty text", Document((image(16, 16), Text("a"), Text(" \n")), "toys", "x")),
    ("replacement character", Document((Text("a caf\ufffd"),), "toys", "x")),
    ("control character", Document((Text("a\tb\r\nc\x07"),), "toys", "x")),
    ("empty text", Document((Text("a", variants=(("de", " "),)),), "toys", "x")),
    ("replacement character", Document((Text("a", variants=(("de", "\ufffd"),)),), "toys", "x")),
    ("control character", Document((Text("a", variants=(("de", "\x07"),)),), "toys", "x")),
]


@pytest.mark.parametrize(("kind", "document"), DOCUMENTS)
def test_each_defect_of_a_document_is_found_with_its_key(
    tmp_path: Path, kind: str, document: Document
) -> None:
    shards_of([*good(), document], tmp_path)
    assert found_in(tmp_path) == [(kind, "x")]


def test_tabs_and_line_ends_are_no_defect(tmp_path: Path) -> None:
    shards_of([Document((Text("a\tb\r\nc\x85d\u2028e"),), "toys", "x")], tmp_path)
    assert found_in(tmp_path) == []


def test_a_text_of_space_alone_teaches_nothing(tmp_path: Path) -> None:
    shards_of([Document((image(16, 16), Text(" ")), "toys", "x")], tmp_path)
    assert found_in(tmp_path) == [("no learned text", "x"), ("empty text", "x")]


def test_keys_are_looked_for_across_the_shards_of_one_source(tmp_path: Path) -> None:
    shards_of(good(2), tmp_path)
    twin = Document.caption(image(16, 16, 7), "another", "toys", "good1")
    write_shards([twin], tmp_path / "b", "s")
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / path.name.replace("000000", "000001"))
    assert found_in(tmp_path) == [("duplicate key", "good1")]
    write_shards([twin], tmp_path / "c", "other")
    assert ("duplicate key", "good1") not in found_in(tmp_path / "c")


def test_the_same_document_under_two_keys_is_found_across_sources(tmp_path: Path) -> None:
    shards_of(good(2), tmp_path)
    first = good(1)[0]
    write_shards([Document(first.parts, "toys", "again")], tmp_path, "t")
    report = lint(find_sources([str(tmp_path)]))
    assert [(d.kind, d.key, d.detail) for d in report.defects] == [
        ("duplicate document", "again", "the same as s good0")
    ]


def test_what_a_document_says_decides_its_hash() -> None:
    base = Document((image(), Text("ab")))
    others = [
        Document((image(seed=1), Text("ab"))),
        Document((Text("ab"), image())),
        Document((image(), Text("a"), Text("b"))),
        Document((image(), Text("ab", learned=False))),
        Document((image(), Text("abc"))),
        Document((image(), Text("ab", variants=(("c", ""),)))),
        Document((image(), Text("ab", variants=(("d", "c"),)))),
    ]
    assert content_hash(Document(base.parts, "s", "k")) == content_hash(base)
    assert len({content_hash(each) for each in [base, *others]}) == 8
    sly = Document((Text("aNone\0True\0b"),))
    assert content_hash(sly) != content_hash(Document((Text("a"), Text("b"))))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the padding after the last document
    path.write_bytes(data)


def lose_index(path: Path) -> None:
    index_path(path).unlink()


def cut_and_lose_index(path: Path) -> None:
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 10])
    lose_index(path)


def break_index(path: Path) -> None:
    index_path(path).write_bytes(b"no index")


SHARDS: list[tuple[Callable[[Path], None], list[str]]] = [
    (cut, ["truncated shard", "damaged document"]),
    (grow, ["changed shard"]),
    (flip, ["changed shard"]),
    (lose_index, ["missing index"]),
    (cut_and_lose_index, ["missing index", "truncated shard"]),
    (break_index, ["damaged index"]),
]


@pytest.mark.parametrize(("damage", "kinds"), SHARDS)
def test_each_defect_of_a_shard_is_found_and_the_others_are_looked_at(
    tmp_path: Path, damage: Callable[[Path], None], kinds: list[str]
) -> None:
    paths = shards_of([*good(4)], tmp_path, per_shard=2)
    damage(paths[0])
    report = lint(find_sources([str(tmp_path)]))
    assert [defect.kind for defect in report.defects] == kinds
    assert all(defect.shard == str(paths[0]) for defect in report.defects)
    assert report.documents >= 2


def test_what_a_model_says_is_asked(tmp_path: Path) -> None:
    documents = [
        Document((Text("turn <end> turn"),), "toys", "special"),
        Document((Text("fine"),), "toys", "refused"),
        page([30, 30], "cut"),
        page([30, 90], "lost"),
    ]
    shards_of(documents, tmp_path)
    assert found_in(tmp_path) == []
    assert found_in(tmp_path, rules=RULES) == [
        ("special token in text", "special"),
        ("refused by the model", "refused"),
    ]
    assert found_in(tmp_path, rules=RULES, tokens=50) == [
        ("special token in text", "special"),
        ("refused by the model", "refused"),
        ("document above a pack", "cut"),
        ("piece above a pack", "lost"),
        ("document above a pack", "lost"),
    ]
    assert ("document above a pack", "cut") in found_in(tmp_path, rules=RULES, tokens=60)
    assert ("document above a pack", "cut") not in found_in(tmp_path, rules=RULES, tokens=61)


def test_records_that_sharding_refused_are_errors_with_key_and_reason(tmp_path: Path) -> None:
    refused = [Refusal("toys", f"gone{number}", f"no caption {number}") for number in range(2)]
    paths = shards_of([refused[0], *good(), refused[1], good(1)[0]], tmp_path, 4)
    report = lint(find_sources([str(tmp_path)]))
    assert [(d.kind, d.level, d.shard, d.key, d.detail) for d in report.defects] == [
        ("refused when sharded", "error", str(paths[0]), "gone0", "no caption 0"),
        ("refused when sharded", "error", str(paths[1]), "gone1", "no caption 1"),
        ("refused when sharded", "error", str(paths[1]), "good0", DUPLICATE),
    ]
    assert report.documents == 3
    cut(paths[1])
    assert found_in(tmp_path)[:3] == [
        ("refused when sharded", "gone0"),
        ("truncated shard", ""),
        ("refused when sharded", "gone1"),
    ]


def test_variants_are_looked_at_like_other_texts(tmp_path: Path) -> None:
    variants = (("alt", "turn <end> turn"), ("de", "Biene\ufffd"))
    shards_of([Document((Text("a"), Text("a bee", variants=variants)), "toys", "x")], tmp_path)
    report = lint(find_sources([str(tmp_path)]), rules=RULES)
    assert [(defect.kind, defect.detail) for defect in report.defects] == [
        ("replacement character", "text 2, variant 'de': 1 of them, the first after 'Biene'"),
        ("special token in text", "text 2, variant 'alt' contains '<end>'"),
    ]


def test_tokens_without_a_model_are_refused(tmp_path: Path) -> None:
    shards_of(good(), tmp_path)
    with pytest.raises(ValueError, match="only known with a model"):
        found_in(tmp_path, tokens=50)


def test_workers_find_the_same_and_say_how_far_they_are(tmp_path: Path) -> None:
    paths = shards_of([*captions(200), *(each for _, each in DOCUMENTS[:1])], tmp_path, 120)
    flip(paths[1])
    told: list[tuple[int, int]] = []
    reports = [
        lint(
            find_sources([str(tmp_path)]),
            rules=RULES,
            tokens=50,
            executor=Executor("local", workers),
            advance=lambda done, total: told.append((done, total)),
        )
        for workers in (0, 2)
    ]
    assert reports[0] == reports[1]
    assert {"changed shard", "undecodable image"} <= {d.kind for d in reports[0].defects}
    assert told[0] == (0, 201)
    assert told[-1] == (201, 201)


def test_the_table_and_the_summary_name_kinds_numbers_and_keys(tmp_path: Path) -> None:
    documents = [
        Document((Text(f"{number} [red] \ufffd"),), "toys", f"key{number}") for number in range(5)
    ]
    shards_of([*documents, with_image(b"no image", "broken")], tmp_path)
    report = lint(find_sources([str(tmp_path)]))
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(lint_tables(report))
    text = console.export_text()
    assert text.index("undecodable image") < text.index("replacement")
    for words in ("s broken: image 1", "key0", "key2", "… and 2 more", "[red]"):
        assert words in text
    assert "key3" not in text
    assert summary(report)["kinds"] == {"replacement character": 5, "undecodable image": 1}
    assert (report.count("error"), report.count("warning")) == (1, 5)
    assert "1 error, 5 warnings" in verdict(report)


def test_no_kind_is_both() -> None:
    assert not ERRORS.keys() & WARNINGS.keys()
