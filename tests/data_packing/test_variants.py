"""Named texts in the formats that bring them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from format_toys import expect, gather, pictures, spoken, write_lines, write_parquet, write_tar
from packing_toys import png

from data_packing.document import Document, Text

Texts = dict[str, str]


def sidecar(**record: object) -> bytes:
    return json.dumps(record).encode()


def last(document: Document) -> tuple[str, Texts]:
    """The text that nobody chose, and the variants."""
    text = document.parts[-1]
    assert isinstance(text, Text)
    return text.text, dict(text.variants)


def write_map(path: Path, records: list[dict[str, Any]]) -> Path:
    """Parquet whose column `texts` is a map, not a struct."""
    columns = {
        "image": pyarrow.array([record["image"] for record in records]),
        "texts": pyarrow.array(
            [list(record["texts"].items()) for record in records],
            pyarrow.map_(pyarrow.string(), pyarrow.string()),
        ),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    "write",
    [lambda path, records: write_lines(path, *records), write_parquet, write_map],
    ids=["jsonl", "struct", "map"],
)
def test_a_column_of_texts_by_name(
    write: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path
) -> None:
    records = [
        {"image": "one.png", "texts": {"synthetic": " a bee ", "alt": "IMG_1"}},
        {"image": "two.png", "texts": {"synthetic": None, "alt": "IMG_2"}},
    ]
    documents, refused = gather(write(pictures(tmp_path) / "a.data", records))
    assert refused == {}
    assert [last(document) for document in documents.values()] == [
        ("a bee", {"alt": "IMG_1", "synthetic": "a bee"}),  # the first in the file, not by name
        ("IMG_2", {"alt": "IMG_2"}),
    ]


def test_the_caption_is_the_text_that_nobody_chose(tmp_path: Path) -> None:
    path = write_lines(
        pictures(tmp_path) / "a.jsonl",
        {"image": "one.png", "texts": {"alt": "IMG_1"}, "caption": "a bee"},
        {"image": "one.png", "texts": {}, "text": "a cat"},
        {"image": "one.png", "texts": None, "caption": "a dog"},
    )
    documents, refused = gather(path)
    assert refused == {}
    assert [last(document) for document in documents.values()] == [
        ("a bee", {"alt": "IMG_1"}),
        ("a cat", {}),
        ("a dog", {}),
    ]


def test_texts_of_a_column_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    texts: list[dict[str, Any]] = [{"alt": "  "}, {"alt": 5}, {"": "a"}, {"alt": None}, {}]
    records = [{"image": "one.png", "texts": named} for named in texts]
    path = write_lines(pictures(tmp_path) / "a.jsonl", *records)
    documents, refused = gather(path)
    assert not documents
    expect(
        refused,
        {
            "line 1": "the text 'alt' is empty",
            "line 2": "the text 'alt' must be a text, not 5",
            "line 3": "no name",
            "line 4": "no caption (looked for caption, text, txt, texts)",
            "line 5": "no caption (looked for",
        },
    )


def test_named_texts_beside_an_image_in_a_tar(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar",
        {
            "0.png": png(),
            "0.synthetic.txt": b"a bee ",
            "0.alt.TXT": "\ufeffIMG_0".encode(),
            "1.alt.txt": b"IMG_1",
            "1.jpg": png(),
            "1.txt": b"a cat",
            "2.png": png(),
            "2.json": sidecar(caption="a dog", texts={"alt": "IMG_2", "DE": "ein Hund"}),
            "3.png": png(),
            "3.json": sidecar(texts={"z": "first", "a": "second"}, url="x"),
            "4.png": png(),
            "4.De.txt": b"Ente",
            "4.json": sidecar(texts={"alt": "IMG_4", "De": "Ente"}),
            "5.png": png(),
            "5.txt": b"plain",
            "5.json": sidecar(texts=["not", "named"]),
            "deep.er/6.a.png": png(),
            "deep.er/6.b.png": png(),
            "deep.er/6.alt.en.txt": b"two",
        },
    )
    documents, refused = gather(tar)
    assert refused == {}
    assert [last(document) for document in documents.values()] == [
        ("a bee", {"alt": "IMG_0", "synthetic": "a bee"}),
        ("a cat", {"alt": "IMG_1"}),
        ("a dog", {"alt": "IMG_2", "DE": "ein Hund"}),
        ("first", {"a": "second", "z": "first"}),
        ("Ente", {"De": "Ente", "alt": "IMG_4"}),
        ("plain", {}),
        ("two", {"alt.en": "two"}),
    ]


def test_named_texts_in_a_tar_that_cannot_be_used(tmp_path: Path) -> None:
    talk = spoken(("human", "<image>?"), ("gpt", "A bee."))
    tar = write_tar(
        tmp_path / "a.tar",
        {
            "0.png": png(),
            "0.alt.txt": b"a",
            "0.json": sidecar(texts={"alt": "b"}),
            "1.png": png(),
            "1.alt.txt": b"a",
            "1.Alt.txt": b"b",
            "2.5.png": png(),
            "2.5.txt": b"the caption of 2.5, not the text 5 of 2",
            "2.6.png": png(),
            "2.6.txt": b"and of 2.6",
            "3.png": png(),
            "3.alt.txt": b"a",
            "3.json": sidecar(conversations=talk),
            "4.png": png(),
            "4.alt.txt": b" ",
            "5.png": png(),
            "5.alt.txt": "Käfer".encode("latin-1"),
            "6.png": png(),
            "6.txt": b"a",
            "6.caption": b"b",
            "7.alt.txt": b"alone",
            "8.png": png(),
            "8.json": sidecar(texts={"alt": None}),
        },
    )
    documents, refused = gather(tar)
    assert not documents
    expect(
        refused,
        {
            "a/0": "the text 'alt' in alt.txt and json differ",
            "a/1": "1.Alt.txt stands in the tar twice",
            "a/2": "5.txt and 5.png: names end at the first dot",
            "a/3": "both a caption (alt.txt) and a record (json)",
            "a/4": "the alt.txt is empty",
            "a/5": "the alt.txt is not UTF-8",
            "a/6": "several captions: txt, caption; give them names",
            "a/7": "no image or clip beside alt.txt",
            "a/8": "no caption beside png, json",
        },
    )
