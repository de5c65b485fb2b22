from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from format_toys import clip
from hypothesis import given
from hypothesis import strategies as st
from packing_toys import png
from test_images import bomb

from data_packing import formats
from data_packing.document import Document, Image, Text
from data_packing.formats.common import divide
from data_packing.ledger import Refusal


def read(kind: str, path: Path) -> tuple[dict[str, Document], dict[str, str]]:
    items = list(formats.read(path, kind))
    documents = {item.key: item for item in items if isinstance(item, Document)}
    refused = {item.key: item.reason for item in items if isinstance(item, Refusal)}
    assert len(documents) + len(refused) == len(items)
    return documents, refused


def test_captions_are_read_in_order_and_bad_ones_named(tmp_path: Path) -> None:
    folder = tmp_path / "stamps"
    (folder / "deep").mkdir(parents=True)
    files: dict[str, bytes] = {
        "b.png": png(),
        "b.txt": b"a bee\nde.utf8=eine Biene\n",
        "deep/a.PNG": png(seed=1),
        "deep/a.TXT": "\ufeffein Käfer ".encode(),
        "nocaption.png": png(),
        "empty.png": b"",
        "empty.txt": b"nothing",
        "blank.png": png(),
        "blank.txt": b"\n\n",
        "latin.png": png(),
        "latin.txt": "Käfer".encode("latin-1"),
        "cut.png": png()[:20],
        "cut.txt": b"cut",
        "bomb.png": bomb(20_000, 20_000),
        "bomb.txt": b"bomb",
        "page.png": b"<html>404</html>",
        "page.txt": b"not an image",
        "alone.txt": b"no image",
        "readme.md": b"ignored",
        "shout.JPG": png(seed=3),
        "shout.TXT": b"LOUD",
        "twice.png": png(),
        "twice.txt": b"first",
        "twice.TXT": b"second",
        "clip.MP4": clip(2),
        "clip.txt": b"grey",
        "broken.webm": b"\x1a\x45\xdf\xa3",
        "broken.txt": b"no clip",
        "nothing.mkv": b"",
        "nothing.txt": b"nothing",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "linked.png").write_bytes(png())
    (folder / "linked.txt").symlink_to("/etc/hostname")
    documents, refused = read("captions", folder)
    assert list(documents) == ["b.png", "clip.MP4", "deep/a.PNG", "shout.JPG", "twice.png"]
    assert [type(part) for part in documents["clip.MP4"].parts] == [Image, Image, Text]
    assert documents["shout.JPG"].parts[1] == Text("LOUD")
    assert documents["twice.png"].parts[1] == Text("first")
    assert documents["b.png"].parts[1] == Text("a bee")
    assert documents["deep/a.PNG"].parts[1] == Text("ein Käfer")
    assert documents["b.png"].source == "stamps"
    reasons = {
        "nocaption.png": "nocaption.txt is missing",
        "empty.png": "image empty.png: empty image file (0 bytes)",
        "blank.png": "caption blank.txt is empty",
        "latin.png": "caption latin.txt is not UTF-8 (byte 1)",
        "cut.png": "image cut.png: ",
        "bomb.png": "above the limit",
        "page.png": "not an image of a known format",
        "alone.txt": "a caption without an image",
        "twice.TXT": "a second caption beside twice.txt",
        "broken.webm": "video broken.webm: not a video that can be read",
        "nothing.mkv": "video nothing.mkv: empty video file",
        "linked.png": "caption linked.txt lies outside",
    }
    assert refused.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert reason in refused[key]


def test_what_only_looks_like_an_image_is_refused_as_what_it_is(tmp_path: Path) -> None:
    folder, far = tmp_path / "photos", tmp_path / "far"
    (folder / "real").mkdir(parents=True)
    far.mkdir()
    for place in (folder, folder / "real", far):
        (place / "bee.png").write_bytes(png())
        (place / "bee.txt").write_text("a bee")
    kinds = ("heic", "HEIF", "jp2", "jxl", "psd", "svg", "raw", "nef", "avif")
    for kind in kinds:
        (folder / f"one.{kind}").write_bytes(b"picture")
    (folder / "one.txt").write_text("a caption of one.heic")
    (folder / "linked").symlink_to(far)
    (folder / "linked.txt").write_text("of no image")
    (folder / "inner").symlink_to(folder / "real")
    for name in ("gone", "lost"):
        (folder / f"{name}.png").symlink_to(tmp_path / "nothing.png")
    (folder / "gone.txt").write_text("a caption of nothing")
    (folder / "folder.png").mkdir()
    (folder / "folder.txt").write_text("a caption of a folder")
    (folder / "film.wmv").write_bytes(b"film")
    (folder / "film.txt").write_text("a caption of a film")
    (folder / "mute.png").write_bytes(png())
    (folder / "mute.txt").symlink_to(folder / "no.txt")
    os.mkfifo(folder / "pipe.png")
    documents, refused = read("captions", folder)
    assert list(documents) == ["bee.png", "real/bee.png"]
    link = "a link to a folder is not followed: give the folder itself"
    assert refused == {
        "film.txt": "a caption without an image of the same name: film.wmv is not read as one",
        "folder.txt": "a caption without an image of the same name: folder.png is a folder",
        "gone.png": "a link to nothing",
        "inner": link,
        "linked": link,
        "linked.txt": "a caption without an image of the same name",
        "lost.png": "a link to nothing",
        "mute.png": "no caption: mute.txt is a link to nothing",
        "pipe.png": "no plain file",
        **{
            f"one.{kind}": f"{kind.upper()} is not a kind of image that can be read: convert it"
            for kind in kinds
        },
    }


def test_captions_need_a_folder_with_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        read("captions", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no image in"):
        read("captions", tmp_path)


def test_what_json_cannot_read_is_said_in_words(tmp_path: Path) -> None:
    good = '{"id": "1", "texts": ["a"], "images": [null]}'
    huge = '{"id": ' + "1" * 5000 + ', "texts": ["a"], "images": [null]}'
    deep = '{"id": ' + "[" * 100_000
    digits, nested = (
        "JSON with a number of more than 4,300 digits",
        "JSON that is nested too deeply",
    )
    (tmp_path / "a.jsonl").write_text("\n".join([good, huge, deep]))
    documents, refused = read("interleaved", tmp_path / "a.jsonl")
    assert (list(documents), refused) == (["1"], {"line 2": digits, "line 3": nested})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("0.json")
        info.size = len(huge)
        archive.addfile(info, io.BytesIO(huge.encode()))
    assert read("webdataset", tmp_path / "a.tar")[1] == {"a/0": f"the json is {digits}"}
    (tmp_path / "a.json").write_text(f"[{good}, {huge}]")
    with pytest.raises(ValueError, match=f"a.json is {digits}$"):
        read("interleaved", tmp_path / "a.json")
    (tmp_path / "dataset_info.json").write_text('{"a": {"file_name": ' + "1" * 5000 + "}}")
    with pytest.raises(ValueError, match=f"dataset_info.json is {digits}$"):
        read("llamafactory", tmp_path / "dataset_info.json")


def test_interleaved_pages(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    (tmp_path.parent / "secret.png").write_bytes(png())

    def entry(key: Any, texts: Any, images: Any) -> bytes:
        return json.dumps({"key": key, "texts": texts, "images": images}).encode()

    lines = [
        entry("good", ["a", None, "b"], [None, "one.png", None]),
        b"",
        b'{"key": "half',
        b"[1, 2]",
        b'{"key": "\xff"}',
        entry("lengths", ["a"], [None, "one.png"]),
        entry("both", ["a"], ["one.png"]),
        entry("neither", [None], [None]),
        entry("missing", [None], ["two.png"]),
        entry("outside", [None], ["../secret.png"]),
        entry("absolute", [None], [str(tmp_path.parent / "secret.png")]),
        entry("number", [7], [None]),
        entry("odd", [None], [["one.png"]]),
        entry("nul", [None], ["a\0b.png"]),
        entry("nothing", [], []),
        entry("lists", "a", None),
        entry("", ["a"], [None]),
    ]
    (tmp_path / "pages.jsonl").write_bytes(b"\n".join(lines))
    documents, refused = read("interleaved", tmp_path / "pages.jsonl")
    assert list(documents) == ["good", "line 17"]
    kinds = [type(part) for part in documents["good"].parts]
    assert kinds == [Text, Image, Text]
    reasons = {
        "line 3": "not JSON",
        "line 4": "must be an object, not list",
        "line 5": "not UTF-8 (byte 9 of the line)",
        "lengths": '1 "texts" but 2 "images"',
        "both": "place 1 has both text and image",
        "neither": "place 1 has neither",
        "missing": "image two.png: No such file",
        "outside": "image ../secret.png lies outside",
        "absolute": "lies outside",
        "number": "text must be a string, not 7",
        "odd": "must be a file name",
        "nul": "null",
        "nothing": "the page is empty",
        "lists": "must both be lists",
    }
    assert refused.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert reason in refused[key]
    with pytest.raises(ValueError, match="no file at"):
        read("interleaved", tmp_path / "nowhere.jsonl")


@given(st.text(alphabet="ab .\n", max_size=200), st.integers(1, 40))
def test_divided_text_joins_to_the_same_and_is_short_where_it_can_be(
    text: str, longest: int
) -> None:
    parts = divide(text, longest)
    assert "".join(parts) == text
    assert all(parts) or text == ""
    for part in parts:
        assert len(part) <= longest or not any(letter.isspace() for letter in part[:-1])


def test_long_pages_can_be_cut_between_paragraphs(tmp_path: Path) -> None:
    text = "\n\n".join("word " * 150 for _ in range(6))
    line = json.dumps({"key": "k", "texts": [text], "images": [None]})
    (tmp_path / "p.jsonl").write_text(line)
    document = read("interleaved", tmp_path / "p.jsonl")[0]["k"]
    assert len(document.pieces()) == 3
    assert "".join(part.text for part in document.parts) == text
    assert all(part.text.endswith("\n") for part in document.parts[:-1])


def test_llava_conversations(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    (tmp_path / "two.png").write_bytes(png(seed=2))

    def entry(key: Any, image: Any, *turns: tuple[str, str]) -> dict[str, Any]:
        spoken = [{"from": who, "value": value} for who, value in turns]
        record = {"id": key, "image": image, "conversations": spoken}
        return {name: value for name, value in record.items() if value is not None}

    ask, answer = ("human", "<image>\nWhat is it?"), ("gpt", "A bee.")
    records = [
        entry("good", "one.png", ("system", "Be brief."), ask, answer),
        entry(7, ["one.png", "two.png"], ("human", "Is <image> or <image> red?"), answer),
        entry("text", None, ("human", "Hello"), answer),
        entry("too many", ["one.png", "two.png"], ask, answer),
        entry("too few", None, ask, answer),
        entry("missing", "three.png", ask, answer),
        entry("outside", "/etc/hostname", ask, answer),
        entry("robot", "one.png", ask, ("robot", "A bee.")),
        entry("no answer", "one.png", ask),
        entry("empty answer", "one.png", ask, ("gpt", " ")),
        entry("in answer", "one.png", ("human", "Draw"), ("gpt", "<image>")),
        entry("no turns", "one.png"),
        {"id": "odd turn", "conversations": ["hello"]},
        entry(None, None, ("human", "Hello"), answer),
        "text",
    ]
    (tmp_path / "talk.json").write_text(json.dumps(records))
    documents, refused = read("llava", tmp_path / "talk.json")
    assert list(documents) == ["good", "7", "text", "record 14"]
    good = documents["good"].parts
    assert [part.role for part in good] == ["system", "user", "user", "assistant"]
    assert isinstance(good[1], Image)
    assert good[2] == Text("What is it?", "user", learned=False)
    assert good[3] == Text("A bee.", "assistant", learned=True)
    words = [p.text if isinstance(p, Text) else p.data for p in documents["7"].parts]
    assert words == ["Is", png(), "or", png(seed=2), "red?", "A bee."]
    reasons = {
        "too many": "1 <image> in the text but 2 images",
        "too few": "1 <image> in the text but 0 images",
        "missing": "image three.png: No such file",
        "outside": "lies outside",
        "robot": "turn 2 is from 'robot'; known: human",
        "no answer": "no turn of the assistant",
        "empty answer": "turn 2: the answer is empty",
        "in answer": "turn 2: <image> in a turn of the assistant",
        "no turns": 'no "conversations"',
        "odd turn": 'turn 1 has no "value"',
        "record 15": "must be an object",
    }
    assert refused.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert reason in refused[key]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1}', 'the columns "a", where "conversations" is needed'),
        (b"[", "not JSON"),
        (b'["\xff"]', "not UTF-8"),
        (b"", "not JSON"),
    ],
)
def test_a_file_that_is_no_list_of_conversations(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "talk.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read("llava", tmp_path / "talk.json")
