from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

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
)
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_toys import png

from data_packing.document import Document, DocumentError, Text
from data_packing.formats import Options
from data_packing.formats.layouts import LAYOUTS, layouts_of
from data_packing.formats.media import Media

URL = "data:image/png;base64," + base64.b64encode(png(seed=3)).decode()


def test_openai_messages(tmp_path: Path) -> None:
    pictures(tmp_path)
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image_url", "image_url": {"url": "one.png", "detail": "low"}},
        {"type": "image_url", "image_url": URL},
        {"type": "text", "text": " a "},
        {"type": "text", "text": "bee?"},
    ]
    named = [{"type": "image", "image": None}, {"type": "text", "text": "What?"}]
    answer = ("assistant", [{"type": "text", "text": ANSWER}])
    path = write_lines(
        tmp_path / "chat.jsonl",
        {"id": "parts", "messages": talk(("developer", "Be brief."), ("user", parts), answer)},
        {"id": "column", "messages": talk(("user", ASK), answer), "images": ["two.png"]},
        {"id": "marks", "messages": talk(("user", named), answer), "image": {"path": "two.png"}},
        {"messages": talk(("User", "Hello"), answer), "system": "Kind.", "images": None},
        {"id": "marks", "messages": talk(("user", "Hello"), answer), "tools": "[]"},
        {
            "id": "file",
            "messages": talk(("user", ASK), answer),
            "images": [f"file://{tmp_path}/one.png"],
        },
        {
            "id": "loss",
            "messages": [
                *talk(("user", "a"), ("assistant", "wrong"), ("user", "b"), ("assistant", "right"))
            ],
        },
    )
    lines = path.read_bytes().replace(b'"wrong"', b'"wrong", "loss": false')
    path.write_bytes(b"\xef\xbb\xbf" + lines)
    documents, refused = gather(path)
    assert refused == {}
    assert list(documents) == [
        "parts",
        "column",
        "marks",
        "line 4",
        "marks (line 5)",
        "file",
        "loss",
    ]
    assert words(documents["parts"]) == [
        ("system", "Be brief."),
        ("user", "Is"),
        ("user", png()),
        ("user", png(seed=3)),
        ("user", "a bee?"),
        ("assistant", ANSWER),
    ]
    assert words(documents["column"])[0] == ("user", png(seed=2))
    assert kinds(documents["marks"]) == "itt"
    assert words(documents["line 4"])[0] == ("system", "Kind.")
    learned = [part.learned for part in documents["loss"].parts if isinstance(part, Text)]
    assert learned == [False, False, False, True]


def test_what_an_image_may_not_be(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in")
    pictures(tmp_path)
    (folder / "link.png").symlink_to(tmp_path / "one.png")
    (folder / "empty.png").write_bytes(b"")
    bad: dict[Any, str] = {
        "no.png": "image no.png: No such file",
        "../one.png": "image ../one.png lies outside",
        "link.png": "image link.png lies outside",
        f"file://{tmp_path}/one.png": "lies outside",
        "empty.png": "image empty.png: empty image file (0 bytes)",
        "https://example.org/a.png": "image https://example.org/a.png is on a network",
        "s3://bucket/a.png": "is on a network and is not fetched",
        "//host/a.png": "is on a network",
        "data:text/html;base64,PGI+": "a data URL of text/html, where image is expected",
        "data:,hello": "a data URL of plain text",
        "data:image/png;base64,@@@": "whose base64 is broken",
        "data:image/png,abc": "not in base64",
        "data:image/png;base64,PGI+": "image in a data URL: not an image of a known format",
        "data:broken": "a broken data URL",
        "a\0b": "null",
        "long" * 100: "File name too long",
        "\ud800.png": "surrogates not allowed",
    }
    records = [
        {"id": str(n), "messages": talk(("user", ASK), ("assistant", "A.")), "images": [name]}
        for n, name in enumerate(bad)
    ]
    _, refused = gather(write_lines(folder / "chat.jsonl", *records))
    expect(refused, {str(n): reason for n, reason in enumerate(bad.values())})
    assert all(len(reason) < 500 for reason in refused.values())


def test_turns_that_cannot_be_used(tmp_path: Path) -> None:
    pictures(tmp_path)
    hello, hi = ("user", "Hello"), ("assistant", "Hi")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"messages": []}, 'no "messages"'),
        ({"messages": talk(hello)}, "no turn of the assistant"),
        ({"messages": talk(hello, ("assistant", "  "))}, "turn 2: the answer is empty"),
        ({"messages": talk(hello, ("assistant", []))}, "turn 2: the answer is empty"),
        ({"messages": talk(hello, ("assistant", None))}, 'turn 2 has no "content"'),
        ({"messages": talk(hello, ("tool", "7"), hi)}, "calls of tools cannot be read"),
        ({"messages": talk(hello, ("wizard", "7"), hi)}, "turn 2 is from 'wizard'; known: human"),
        ({"messages": [None, *talk(hello, hi)]}, 'turn 1 has no "value"'),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
            "calls of tools",
        ),
        ({"messages": talk(("user", [{"type": "audio"}]), hi)}, "part 1 of its content is"),
        ({"messages": talk(("user", ASK), hi)}, "1 <image> in the text but 0 images"),
        (
            {"messages": talk(hello, hi), "images": ["one.png"]},
            "0 <image> in the text but 1 image",
        ),
        ({"messages": talk(("system", ASK), hi), "image": "one.png"}, "in a turn of the system"),
        ({"messages": talk(hello, hi), "image": "a", "images": ["b"]}, "are filled, and differ"),
        ({"messages": talk(hello, hi), "audios": ["a.wav"]}, '"audios": audio cannot be read'),
        ({"messages": talk(hello, hi), "tools": "[{}]"}, '"tools": descriptions of tools'),
        ({"messages": talk(hello, hi), "rejected_response": "No"}, "preference data"),
        ({"messages": talk(hello, hi), "system": 7}, '"system" must be a text, not 7'),
    ]
    path = write_lines(
        tmp_path / "chat.jsonl",
        {"messages": talk(hello, hi)},
        *[record for record, _ in bad],
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": ',
        b'"text"',
    )
    documents, refused = gather(path)
    assert list(documents) == ["line 1"]
    last = ["not UTF-8 (byte 43 of the line)", "not JSON", "must be an object, not str"]
    reasons = [*(reason for _, reason in bad), *last]
    expect(refused, {f"line {n}": reason for n, reason in enumerate(reasons, start=2)})


def test_sharegpt_swift_alpaca_and_columns(tmp_path: Path) -> None:
    pictures(tmp_path)
    turns = spoken(("human", ASK), ("chatgpt", ANSWER))
    both = {"instruction": "Say", "input": "it", "output": "A.", "images": ["one.png"]}
    files: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
        "sharegpt": (
            [{"conversations": turns, "images": ["one.png"], "system": "Kind."}],
            ["Kind.", png(), "What is it?", ANSWER],
        ),
        "swift": (
            [{"query": "b", "response": "c", "history": [["a", "x"]], "images": ["one.png"]}],
            [png(), "a", "x", "b", "c"],
        ),
        "alpaca": ([both], [png(), "Say\nit", "A."]),
        "columns": ([{"image": "one.png", "caption": " a bee "}], [png(), "a bee"]),
    }
    for name, (records, expected) in files.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(records))
        documents, refused = gather(path)
        assert not refused
        assert [what for _, what in words(documents["record 1"])] == expected
        assert documents["record 1"].source == name
    write_lines(
        tmp_path / "bad.jsonl",
        {"query": "a", "response": "b"},
        {"query": "a", "response": None},
        {"query": 7, "response": "b"},
        {"query": "a", "response": "b", "history": [["x"]]},
        {"query": "<image>", "response": "b"},
        {"messages": talk(("user", "a"), ("assistant", "b")), "images": ["one.png"]},
    )
    documents, refused = gather(tmp_path / "bad.jsonl", "swift")
    assert kinds(documents["line 6"]) == "itt"  # ms-swift puts what no mark places in front
    assert list(documents) == ["line 1", "line 6"]
    reasons = [
        "the answer must be a text, not None",
        "the question must be a text, not 7",
        '"history" 1 must be a pair',
        "1 <image> in the text but 0 images",
    ]
    expect(refused, {f"line {n}": reason for n, reason in enumerate(reasons, start=2)})


def test_paths_start_in_the_folder_that_is_named(tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    record = {"id": "1", "image": "one.png", "caption": "a bee"}
    path = write_lines(tmp_path / "talk.jsonl", record)
    assert gather(path)[1].keys() == {"1"}
    assert gather(path, options=Options(images=tmp_path / "images"))[0].keys() == {"1"}


def test_clips_become_frames(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "a.mp4").write_bytes(clip())
    (tmp_path / "cut.mp4").write_bytes(clip()[:500])
    ask = ("user", "<image>Then <video>what?")
    path = write_lines(
        tmp_path / "chat.jsonl",
        {
            "id": "both",
            "messages": talk(ask, ("assistant", "A.")),
            "images": ["one.png"],
            "videos": ["a.mp4"],
        },
        {
            "id": "parts",
            "messages": talk(("user", [{"type": "video", "video": "a.mp4"}]), ("assistant", "A.")),
        },
        {
            "id": "cut",
            "messages": talk(ask, ("assistant", "A.")),
            "images": ["one.png"],
            "video": "cut.mp4",
        },
        {"id": "none", "messages": talk(ask, ("assistant", "A.")), "images": ["one.png"]},
        {
            "id": "gone",
            "messages": talk(("user", "<video>"), ("assistant", "A.")),
            "video": "gone.mp4",
        },
    )
    documents, refused = gather(path, options=Options(frames=3))
    assert {key: kinds(document) for key, document in documents.items()} == {
        "both": "itiiitt",
        "parts": "iiit",
    }
    assert {part.role for part in documents["both"].parts} == {"user", "assistant"}
    expect(
        refused,
        {
            "cut": "video cut.mp4: not a video that can be read",
            "none": "1 <video> in the text but 0 videos",
            "gone": "video gone.mp4: No such file",
        },
    )
    llava = {"video": "a.mp4", "conversations": spoken(("human", ASK), ("gpt", ANSWER))}
    documents, _ = gather(write_lines(tmp_path / "l.jsonl", llava), options=Options(frames=2))
    assert kinds(documents["line 1"]) == "iitt"


COLUMNS = (
    "conversations",
    "messages",
    "images",
    "image",
    "video",
    "texts",
    "text_list",
    "system",
    "image_info",
    "query",
    "response",
    "history",
    "instruction",
    "input",
    "output",
    "text",
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["<image>", "<video>", "a.png", "human", "user", "gpt", "assistant", b"x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "from",
                    "value",
                    "role",
                    "content",
                    "type",
                    "text",
                    "url",
                    "user",
                    "assistant",
                    "path",
                    "bytes",
                    "matched_text_index",
                    "image_name",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.dictionaries(st.sampled_from(COLUMNS), VALUES))
def test_whatever_a_record_holds_it_is_a_document_or_refused(
    name: str, record: dict[str, Any]
) -> None:
    assert set(layouts_of(record)) <= set(LAYOUTS)
    with contextlib.suppress(DocumentError):
        assert Document(tuple(LAYOUTS[name].parts(record, Media(Path("/nowhere"))))).parts


@given(st.lists(st.sampled_from(["<image>", "word", " ", "\n"]), max_size=8))
def test_every_image_stands_where_its_mark_stood(pieces: list[str]) -> None:
    marks = pieces.count("<image>")
    data = [png(seed=number) for number in range(marks)]
    record = {"conversations": spoken(("human", "".join(pieces)), ("gpt", "A.")), "images": data}
    parts = LAYOUTS["llava"].parts(record, Media(Path()))
    document = Document(tuple(parts))
    assert [image.data for image in document.images] == data
    seen = "".join("#" if kind == "i" else "w" for kind in kinds(document)[:-1])
    said = "".join("#" if piece == "<image>" else "w" for piece in pieces if piece.strip())
    if marks:
        while "ww" in said:
            said = said.replace("ww", "w")
        assert seen == said


@pytest.mark.parametrize("value", [7, [], {}, {"bytes": None, "path": None}, "", None])
def test_what_is_no_image_at_all_is_said(value: Any) -> None:
    with pytest.raises(DocumentError, match="an image must be a file name, not"):
        Media(Path()).image(value)
