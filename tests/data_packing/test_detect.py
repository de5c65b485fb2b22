from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from format_toys import (
    ANSWER,
    ASK,
    clip,
    gather,
    pictures,
    spoken,
    talk,
    write_lines,
    write_parquet,
    write_tar,
)
from packing_toys import png

from data_packing.formats import READERS, detect, read

RECORDS: dict[str, dict[str, Any]] = {
    "llava": {"id": "1", "image": "one.png", "conversations": spoken(("human", ASK), ("gpt", "A"))},
    "sharegpt": {"images": ["one.png"], "conversations": spoken(("human", ASK), ("gpt", ANSWER))},
    "messages": {"images": ["one.png"], "messages": talk(("user", ASK), ("assistant", ANSWER))},
    "swift": {"query": "What?", "response": ANSWER, "images": ["one.png"]},
    "alpaca": {"instruction": "What?", "input": "", "output": ANSWER},
    "interleaved": {"texts": ["a", None], "images": [None, "one.png"], "metadata": "{}"},
    "mmc4": {
        "text_list": ["a"],
        "image_info": [{"image_name": "one.png", "matched_text_index": 0}],
    },
    "finevision": {"images": ["one.png"], "texts": [{"user": "What?", "assistant": ANSWER}]},
    "columns": {"image": "one.png", "caption": "a bee"},
}
NAMED = {"image": "one.png", "texts": {"alt": "a bee", "de": "eine Biene"}}


def write_json(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(records, indent=1))
    return path


def write_json_on_one_line(path: Path, *records: Any) -> Path:
    path.write_text("\ufeff" + json.dumps(records))
    return path


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("write", [write_lines, write_json, write_json_on_one_line])
def test_every_layout_is_found_and_read_whatever_the_file_is_called(
    name: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    pictures(tmp_path)
    for ending in (".json", ".jsonl", ".data"):
        path = write(tmp_path / f"set{ending}", RECORDS[name], RECORDS[name])
        assert detect(path) == name
        documents, refused = gather(path)
        assert (len(documents), refused) == (2, {})
        assert [d.parts for d in gather(path, name)[0].values()] == [
            d.parts for d in documents.values()
        ]


@pytest.mark.parametrize("more", [{}, {"caption": "a bee"}, {"url": "x"}])
def test_a_mapping_of_texts_is_no_page(more: dict[str, str], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "set.jsonl", {**NAMED, **more})
    assert detect(path) == "columns"
    assert detect(write_parquet(tmp_path / "set.parquet", [{**NAMED, **more}])) == "columns"


@pytest.mark.parametrize("name", RECORDS)
def test_a_wrong_name_says_what_it_saw_and_what_it_looks_like(name: str, tmp_path: Path) -> None:
    alike = {"llava": "sharegpt", "sharegpt": "llava", "messages": "swift"}
    path = write_lines(tmp_path / "set.jsonl", RECORDS[name])
    for wrong in RECORDS.keys() - {name, alike.get(name)}:
        first = next(iter(RECORDS[name]))
        with pytest.raises(ValueError, match=f'{wrong}: .*"{first}".*; it looks like {name}$'):
            list(read(path, wrong))


def test_folders(tmp_path: Path) -> None:
    captions = pictures(tmp_path / "captions")
    (captions / "one.TXT").write_text("a bee")
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(clip(2))
    (clips / "a.txt").write_text("grey")
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "a.tar", {"a.png": png(), "a.txt": b"a bee"})
    llava = pictures(tmp_path / "llava")
    write_json(llava / "talk.json", RECORDS["llava"])
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"query": "a", "response": "b"}]).save_to_disk(saved)
    sets = tmp_path / "sets"
    sets.mkdir()
    (sets / "dataset_info.json").write_text('{"a": {"file_name": "a.json"}}')
    parquet = tmp_path / "parquet" / "data"
    parquet.mkdir(parents=True)
    write_parquet(parquet / "train-0.parquet", [RECORDS["finevision"]])
    expected = {
        captions: "captions",
        clips: "captions",
        tars: "webdataset",
        llava: "llava",
        saved: "swift",
        sets: "llamafactory",
        parquet.parent: "finevision",
    }
    assert {path: detect(path) for path in expected} == expected
    for path, wrong in ((tars, "llava"), (llava / "talk.json", "captions"), (clips, "webdataset")):
        name = expected.get(path, "llava")
        with pytest.raises(ValueError, match=f"^{wrong}: .*{path.name}.*; it looks like {name}$"):
            list(read(path, wrong))
    with pytest.raises(ValueError, match="^webdataset: .*talk.json is a json file, not a tar; it"):
        list(read(llava / "talk.json", "webdataset"))
    assert list(gather(clips)[0]) == ["a.mp4"]
    assert list(gather(llava)[0]) == ["1"]


def fails(path: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        detect(path)


def test_what_is_unknown_or_ambiguous_is_refused_with_what_was_seen(tmp_path: Path) -> None:
    file, folder = tmp_path / "file.jsonl", tmp_path / "folder"
    folder.mkdir()
    fails(tmp_path / "nowhere", "no file at")
    fails(tmp_path / "*.tar", "no shard matches")
    fails(folder, "folder holds nothing: no images")
    (folder / "a.csv").write_text("a,b")
    fails(folder, "holds only 1 .csv file: no images")
    for content, reason in {
        b"": r"is empty \(0 bytes\)",
        b"a,b\n1,2\n": r"is not JSON, JSON lines, parquet, Arrow or tar; it starts 'a,b",
        b'{"a": ': "it starts '{",
        b"\xff\xfe{\x00": "is not JSON",
        gzip.compress(b"{}"): "compressed with gzip: unpack it first",
        b"PK\x03\x04": "a zip archive",
        b"\x80\x04\x95": "perhaps a pickle, which is never read",
        png(): "an image: give the folder",
        b"<html>": "a page of HTML",
        b'{\n "a": [\n{"b": 1}\n]}': "holds one JSON object",
        b"[]": "holds no record",
        b"[1, 2]": "holds no record",
        b"[{": "is not JSON",
        b'["\xff"]': "is not UTF-8",
        b'{"text": "a"}': 'the columns "text", which is no known layout .llava: "conversations"',
        b'{"messages": [], "conversations": []}': "can be llava or messages: name the format",
    }.items():
        file.write_bytes(content)
        fails(file, reason)
        with pytest.raises(ValueError):
            list(read(file, "messages" if b"conversations" not in content else "mmc4"))
    (folder / "one.png").write_bytes(png())
    (folder / "one.txt").write_text("a bee")
    write_tar(folder / "a.tar", {"a.png": png()})
    fails(folder, "holds 1 .csv file, 1 caption, 1 image or clip, 1 tar: which is meant")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("train.json", "test.json"):
        write_json(two / name, RECORDS["llava"])
    fails(two, "holds 2 .json: give one of them, or a pattern such as .*two/\\*.json")
    assert detect(two / "*.json") == "llava"


def test_records_of_two_layouts_are_ambiguous_but_may_be_named(tmp_path: Path) -> None:
    pictures(tmp_path)
    path = write_lines(tmp_path / "a.jsonl", RECORDS["llava"], RECORDS["columns"])
    with pytest.raises(ValueError, match="can be llava or columns: name the format"):
        detect(path)
    documents, refused = gather(path, "columns")
    assert list(documents) == ["line 2"]
    assert refused == {"1": "no caption (looked for caption, text, txt, texts)"}
    mixed = write_lines(tmp_path / "b.jsonl", RECORDS["llava"], RECORDS["sharegpt"])
    assert detect(mixed) == "sharegpt"
    assert len(gather(mixed)[0]) == 2


def test_a_bad_beginning_does_not_hide_the_layout(tmp_path: Path) -> None:
    for bad in (b"{broken", b"nonsense", b"[1]", b"\xff", b'{"other": 1}'):
        path = write_lines(tmp_path / "a.jsonl", bad, b"", RECORDS["alpaca"])
        assert detect(path) == "alpaca"
        documents, refused = gather(path)
        assert (list(documents), list(refused)) == (["line 3"], ["line 1"])


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown format 'lava'; did you mean 'llava'. Valid: alp"):
        read(tmp_path, "lava")
    assert set(RECORDS) | {"captions", "webdataset", "llamafactory"} == set(READERS)


def test_large_lists_are_recognised_from_their_beginning(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    text = json.dumps([{**RECORDS["alpaca"], "pad": "é" * 5000}] * 300, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    assert path.stat().st_size > 1 << 20
    assert detect(path) == "alpaca"
    path.write_text(text[:-10], encoding="utf-8")
    assert detect(path) == "alpaca"
    with pytest.raises(ValueError, match="alpaca: .*large.json is not JSON"):
        list(read(path))


DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def test_every_format_is_documented_and_the_examples_are_of_it(tmp_path: Path) -> None:
    for name in ("bee.png", "cat.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "bees.json").write_text(json.dumps([RECORDS["sharegpt"]]).replace("one", "bee"))
    sections = re.split(r"^## (\w+)$", DOCS.read_text(), flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert found.keys() == READERS.keys()
    for name, section in found.items():
        for example in re.findall(r"```jsonl\n(.*?)```", section, flags=re.DOTALL):
            path = tmp_path / "example.jsonl"
            path.write_text(example)
            assert detect(path) == name
            documents, refused = gather(path)
            assert documents
            assert not refused


def test_finding_the_format_of_lines_reads_their_beginning_only(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    line = json.dumps({**RECORDS["alpaca"], "pad": "x" * 10_000}) + "\n"
    with open(path, "w") as file:
        file.writelines(line for _ in range(3000))
    tracemalloc.start()
    assert detect(path) == "alpaca"
    next(read(path))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20 < path.stat().st_size
    tracemalloc.stop()
