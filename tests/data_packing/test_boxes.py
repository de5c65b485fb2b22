"""Boxes of records, and clips that know their frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from format_toys import clip, gather, pictures, talk, write_lines
from packing_toys import png

from data_packing.document import Document, DocumentError, Image, Text
from data_packing.formats.boxes import Boxes
from data_packing.lint import content_hash
from data_packing.sharding import write_shards
from data_packing.shards import read_document

SHOWN = Image(png(), 100, 200)


def placed(words: str, **objects: Any) -> list[Text]:
    """The texts of a record with one image of 200 x 100 pixels."""
    record = {"objects": objects} if objects else {}
    parts = list(Boxes(record).place(iter([SHOWN, Text(words)])))
    return [part for part in parts if isinstance(part, Text)]


def test_marks_become_boxes_and_names() -> None:
    objects: dict[str, Any] = {"bbox": [[20, 10, 100, 50], [0, 0, 200, 100]], "ref": ["the cat"]}
    parts = placed("At <bbox> is <ref-object>, in <bbox>.", **objects)
    assert [part.text for part in parts] == ["At ", "", " is the cat, in ", "", "."]
    assert [part.box for part in parts] == [None, (0.1, 0.1, 0.5, 0.5), None, (0, 0, 1, 1), None]
    shares = placed("<bbox>", bbox=[[0.25, 0.5, 0.75, 1]], bbox_type="norm1", image_id=[0])
    assert [part.box for part in shares] == [(0.25, 0.5, 0.75, 1.0)]
    assert [part.text for part in placed("<bbox> is a tag")] == ["<bbox> is a tag"]


@pytest.mark.parametrize(
    ("words", "objects", "reason"),
    [
        ("a", {"bbox": [[0, 0, 1, 1]]}, '0 <bbox> in the text but 1 in "objects"'),
        ("<bbox> <bbox>", {"bbox": [[0, 0, 1, 1]]}, "more <bbox> in the text than the 1 boxes"),
        ("<ref-object>", {"bbox": []} | {"x": 1}, "more <ref-object> in the text than the 0"),
        ("<bbox>", {"bbox": [[0, 0, 1]]}, r"box 1 must be four numbers"),
        ("<bbox>", {"bbox": [[0, 0, True, 3]]}, r"box 1 must be four numbers"),
        ("<bbox>", {"bbox": [[0, 0, 201, 9]]}, "inside its image of 200x100"),
        ("<bbox>", {"bbox": [[5, 5, 5, 9]]}, "inside its image of 200x100"),
        ("<bbox>", {"bbox": [[5, 5, 9, float("nan")]]}, "inside its image of 200x100"),
        ("<bbox>", {"bbox": [[0, 0, 1, 1]], "image_id": [1]}, "box 1 is of image 1, but image 0"),
        ("<bbox>", {"bbox": [[0, 0, 1, 1]], "image_id": []} | {"bbox_type": "yolo"}, "known: real"),
        ("<bbox>", {"bbox": [[0, 0, 1, 1]], "image_id": [0, 0]}, "a number for every bbox"),
        ("<bbox>", {"bbox": "none"}, "bbox must be a list"),
    ],
)
def test_what_cannot_be_a_box_is_refused(words: str, objects: dict[str, Any], reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        placed(words, **objects)


def test_boxes_and_clips_come_back_from_shards(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "a.mp4").write_bytes(clip())
    ask = ("user", "<image>What is at <bbox>? And then <video><video>")
    path = write_lines(
        tmp_path / "chat.jsonl",
        {
            "id": "1",
            "messages": talk(ask, ("assistant", "A bee at <bbox>.")),
            "images": ["one.png"],
            "videos": ["a.mp4", "a.mp4"],
            "objects": json.dumps({"bbox": [[0, 0, 1, 1], [0, 0.5, 0.5, 1]], "bbox_type": "norm1"}),
        },
        {
            "id": "2",
            "messages": talk(("user", "<image>What?"), ("assistant", "A bee at <bbox>.")),
            "images": ["one.png"],
            "objects": {"bbox": [[0, 0, 9999, 1]]},
        },
    )
    documents, refused = gather(path)
    (document,) = documents.values()
    assert "inside its image" in refused["2"]
    numbers = [image.clip for image in document.images]
    assert numbers[0] == 0
    assert sorted(set(numbers)) == [0, 1, 2]
    assert numbers == sorted(numbers)
    boxes = [part for part in document.parts if isinstance(part, Text) and part.box]
    assert [part.learned for part in boxes] == [False, True]
    write_shards([document], tmp_path / "out", "chat")
    again = read_document(next((tmp_path / "out").glob("*.tar")), 0)
    assert again.parts == document.parts
    other = Document((*document.parts[:1], Text("a", "user")))
    assert content_hash(document) != content_hash(other)
