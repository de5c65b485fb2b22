from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from format_toys import (
    ANSWER,
    ASK,
    clip,
    expect,
    gather,
    kinds,
    pictures,
    spoken,
    talk,
    words,
    write_lines,
    write_parquet,
)
from packing_toys import png

from data_packing.document import Document
from data_packing.formats import detect, read
from data_packing.ledger import Refusal


def held(seed: int = 0, path: str | None = None) -> dict[str, Any]:
    """An image as `datasets` stores it."""
    return {"bytes": png(seed=seed), "path": path}


def finevision(**record: Any) -> dict[str, Any]:
    return {
        "images": [held(1), held(2)],
        "texts": [
            {"user": "Which?", "assistant": "The first."},
            {"user": "Sure?", "assistant": "Y"},
        ],
        "source": "toys",
        "relevance_ratings": [5, 5],
        **record,
    }


def test_finevision_parquet(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "part.parquet",
        [
            finevision(),
            finevision(images=[], texts=[{"user": "Hello", "assistant": "Hi"}]),
            finevision(texts=[{"user": "<image> or <image>?", "assistant": "No."}]),
            finevision(texts=[{"user": "<image>?", "assistant": "No."}]),
            finevision(texts=[{"user": "Hm?", "assistant": " "}]),
            finevision(texts=[{"user": "Hm?", "assistant": None}]),
            finevision(texts=[]),
            finevision(images=[{"bytes": b"no image", "path": "x.png"}]),
        ],
    )
    documents, refused = gather(path)
    assert [kinds(document) for document in documents.values()] == ["iitttt", "tt", "itit" + "t"]
    assert words(documents["record 1"])[:3] == [
        ("user", png(seed=1)),
        ("user", png(seed=2)),
        ("user", "Which?"),
    ]
    expect(
        refused,
        {
            "record 4": "1 <image> in the text but 2 images",
            "record 5": "pair 1: the answer is empty",
            "record 6": "pair 1: the answer must be a text, not None",
            "record 7": 'no "texts"',
            "record 8": "image x.png: not an image of a known format",
        },
    )


LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "llava": ({"image": held(), "conversations": spoken(("human", ASK), ("gpt", ANSWER))}, "itt"),
    "messages": ({"images": [held()], "messages": talk(("user", ASK), ("assistant", "A"))}, "itt"),
    "interleaved": ({"images": [None, held()], "texts": ["a", None]}, "ti"),
    "mmc4": (
        {
            "text_list": ["a", "b"],
            "image_info": [{"image_name": "one.png", "matched_text_index": 1}],
        },
        "tit",
    ),
    "finevision": (finevision(), "iitttt"),
    "columns": ({"image": held(path="x.png"), "text": "a bee"}, "it"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_file_of_rows_holds_every_layout(name: str, tmp_path: Path) -> None:
    record, expected = LAYOUTS[name]
    pictures(tmp_path)
    rows = [{"id": f"k{number}", **record} for number in range(3)]
    table = pyarrow.Table.from_pylist(rows)
    files = [write_parquet(tmp_path / "a.parquet", rows)]
    for kind, writer in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        files.append(tmp_path / f"{kind}.arrow")
        with writer(str(files[-1]), table.schema) as out:
            out.write_table(table, 2)
    for file in files:
        assert detect(file) == name
        documents, refused = gather(file)
        assert (list(documents), refused) == (["k0", "k1", "k2"], {})
        assert kinds(documents["k0"]) == expected


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    pictures(tmp_path)
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {"image": [str(tmp_path / "one.png"), None], "caption": ["a bee", "nothing"]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(tmp_path / "plain", num_shards=2)
    both = datasets.DatasetDict({"train": dataset, "test": dataset})
    both.save_to_disk(tmp_path / "splits")
    assert detect(tmp_path / "plain") == detect(tmp_path / "splits") == "columns"
    documents, refused = gather(tmp_path / "plain")
    assert [words(document) for document in documents.values()] == [
        [(None, png()), (None, "a bee")]
    ]
    assert [document.source for document in documents.values()] == ["plain"]
    expect(refused, {"data-00001-of-00002/record 1": "no image"})
    documents, refused = gather(tmp_path / "splits")
    names = ["train/data-00000-of-00001", "test/data-00000-of-00001"]
    assert list(documents) == [f"{name}/record 1" for name in names]
    assert list(refused) == [f"{name}/record 2" for name in names]
    (tmp_path / "plain" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        ValueError, match="state.json names data-00001-of-00002.arrow, which is not"
    ):
        gather(tmp_path / "plain")
    (tmp_path / "plain" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(ValueError, match="must be a plain file name"):
        gather(tmp_path / "plain")


def test_folders_and_patterns_of_parquet(tmp_path: Path) -> None:
    for number in range(2):
        write_parquet(tmp_path / f"train-{number}.parquet", [finevision(), finevision()])
    keys = [f"train-{file}/record {row}" for file in range(2) for row in (1, 2)]
    (tmp_path / "._train-0.parquet").write_bytes(b"of a Mac")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for path in (tmp_path, tmp_path / "train-*.parquet", tmp_path / "train-{0,1}.parquet"):
        assert detect(path) == "finevision"
        documents, _ = gather(path)
        assert list(documents) == keys
        assert {document.source for document in documents.values()} == {tmp_path.name}


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", [finevision(images=[held(n)]) for n in range(300)], group=8
    )
    data = bytearray(path.read_bytes())
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut.parquet is a broken parquet file"):
        gather(tmp_path / "cut.parquet")
    half = len(data) // 2
    data[half : half + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    items = list(read(path))
    assert all(isinstance(item, Document) for item in items[:100])
    assert len(items) >= 300 or "damaged or cut short from here" in str(items[-1])
    assert all(isinstance(item, Document | Refusal) for item in items)
    assert any(isinstance(item, Refusal) for item in items)


def test_text_that_is_not_utf8_refuses_its_row_only(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a bee", "Käfer".encode("latin-1"), b"a cat"]).view(pyarrow.string())
    images = pyarrow.array([png()] * 3)
    table = pyarrow.table({"image": images, "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents, refused = gather(tmp_path / "a.parquet")
    assert list(documents) == ["record 1", "record 3"]
    expect(refused, {"record 2": "not UTF-8 (byte 1)"})


def test_mmc4_pages(tmp_path: Path) -> None:
    pictures(tmp_path)

    def page(*matched: Any, texts: Any = ("A.", "B.", "C.")) -> dict[str, Any]:
        names = ("one.png", "two.png")
        info = [
            {"image_name": name, "matched_text_index": at, "raw_url": "https://example.org"}
            for name, at in zip(names, matched, strict=False)
        ]
        return {"text_list": list(texts), "image_info": info, "similarity_matrix": []}

    path = write_lines(
        tmp_path / "docs.jsonl",
        page(1, 1),
        page(2, 0),
        page(),
        page(texts=[]),
        page(3),
        page(None),
        page(texts=["a", 7]),
        {
            "text_list": ["a"],
            "image_info": [{"raw_url": "https://e.org/a.png", "matched_text_index": 0}],
        },
    )
    assert detect(path) == "mmc4"
    documents, refused = gather(path)
    seen = [[what for _, what in words(document)] for document in documents.values()]
    one, two = png(), png(seed=2)
    assert seen == [["A.", one, two, "B. C."], [two, "A. B.", one, "C."], ["A. B. C."]]
    expect(
        refused,
        {
            "line 4": "the page is empty",
            "line 5": '"matched_text_index" must be a number from 0 to 2, not 3',
            "line 6": "not None",
            "line 7": "sentence 2 must be a string",
            "line 8": "image https://e.org/a.png is on a network and is not fetched",
        },
    )


def test_clips_in_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"video": {"bytes": clip(4)}, "caption": "grey"}])
    assert kinds(gather(path)[0]["record 1"]) == "iiiit"


def test_json_lines_are_read_one_by_one(tmp_path: Path) -> None:
    pictures(tmp_path)
    good = {"image": "one.png", "caption": "a bee"}
    with open(tmp_path / "a.jsonl", "wb") as file:
        for _ in range(3):
            file.write(json.dumps(good).encode() + b"\n")
        file.write(b"{bad\n" * 2)
        file.write(b"[1, 2]\n\n")
        file.write(json.dumps(good).encode())  # no line feed at the end
    documents, refused = gather(tmp_path / "a.jsonl")
    assert list(documents) == ["line 1", "line 2", "line 3", "line 8"]
    assert list(refused) == ["line 4", "line 5", "line 6"]
    stream = read(tmp_path / "a.jsonl")
    next(stream)
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b"\n" + json.dumps(good).encode())
    assert sum(isinstance(item, Document) for item in stream) == 4


def test_a_stream_that_is_cut_short_keeps_what_was_whole(tmp_path: Path) -> None:
    records = [{"id": f"k{n}", "image": held(n), "text": "a bee"} for n in range(30)]
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table, 10)
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[: len(data) // 2])
    documents, refused = gather(tmp_path / "a.arrow")
    assert list(documents) == [f"k{n}" for n in range(10)]
    expect(refused, {"record 11": "the file is damaged or cut short from here"})
    (tmp_path / "a.arrow").write_bytes(data[:40])
    with pytest.raises(ValueError, match="is a broken Arrow file"):
        gather(tmp_path / "a.arrow")
