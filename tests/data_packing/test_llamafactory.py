from __future__ import annotations

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
    write_parquet,
)
from packing_toys import png

from data_packing.formats import detect


def write_sets(folder: Path, sets: dict[str, Any]) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(sets, indent=2))
    return path


def test_sets_with_columns_and_tags(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "a.mp4").write_bytes(clip())
    (tmp_path / "plain.json").write_text(
        json.dumps(
            [{"instruction": "Say", "input": "it", "output": "It.", "history": [["a", "b"]]}]
        )
    )
    write_lines(
        tmp_path / "asked.jsonl", {"q": "What?", "a": ANSWER, "pics": ["one.png"], "sys": "S"}
    )
    (tmp_path / "talk.json").write_text(
        json.dumps([{"conversations": spoken(("human", "Hello"), ("gpt", "Hi"))}])
    )
    own = [{"who": "Q", "said": ASK}, {"who": "R", "said": ANSWER}]
    write_parquet(tmp_path / "tagged.parquet", [{"id": "x", "turns": own, "images": ["two.png"]}])
    write_lines(
        tmp_path / "clip.jsonl",
        {"messages": talk(("user", "<video>What?"), ("assistant", "Grey.")), "videos": ["a.mp4"]},
    )
    turns = {"messages": "messages"}
    path = write_sets(
        tmp_path,
        {
            "plain": {"file_name": "plain.json"},
            "asked": {
                "file_name": "asked.jsonl",
                "columns": {"prompt": "q", "response": "a", "images": "pics", "system": "sys"},
            },
            "talk": {"file_name": "talk.json", "formatting": "sharegpt"},
            "tagged": {
                "file_name": "tagged.parquet",
                "formatting": "sharegpt",
                "columns": {"messages": "turns", "images": "images"},
                "tags": {
                    "role_tag": "who",
                    "content_tag": "said",
                    "user_tag": "Q",
                    "assistant_tag": "R",
                },
            },
            "clip": {
                "file_name": "clip.jsonl",
                "formatting": "openai",
                "columns": {**turns, "videos": "videos"},
            },
        },
    )
    assert detect(path) == detect(tmp_path) == "llamafactory"
    documents, refused = gather(tmp_path)
    assert refused == {}
    said = {key: [what for _, what in words(document)] for key, document in documents.items()}
    assert said["plain/record 1"] == ["Say\nit", "It."]  # history is read where columns name it
    assert said["asked/line 1"] == ["S", png(), "What?", ANSWER]
    assert said["talk/record 1"] == ["Hello", "Hi"]
    assert said["tagged/x"] == [png(seed=2), "What is it?", ANSWER]
    assert kinds(documents["clip/line 1"]) == "i" * 8 + "tt"
    assert documents["tagged/x"].source == "tagged"
    assert list(gather(path, "llamafactory")[0]) == list(documents)


def test_sets_and_records_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.json").write_text("[]")
    calls = spoken(("human", "Hello"), ("function_call", "{}"), ("observation", "7"), ("gpt", "7"))
    (tmp_path / "in" / "talk.json").write_text(
        json.dumps([{"conversations": calls}, {"conversations": None}, 7])
    )
    (tmp_path / "in" / "table.csv").write_text("a,b\n1,2\n")
    shared = {"file_name": "talk.json", "formatting": "sharegpt"}
    path = write_sets(
        tmp_path / "in",
        {
            "hub": {"hf_hub_url": "someone/set"},
            "gone": {"file_name": "gone.json"},
            "outside": {"file_name": "../out.json"},
            "table": {"file_name": "table.csv"},
            "odd": {"file_name": "talk.json", "formatting": "poem"},
            "ranked": {**shared, "ranking": True},
            "chosen": {**shared, "columns": {"messages": "conversations", "chosen": "c"}},
            "lists": {**shared, "columns": []},
            "tools": shared,
        },
    )
    documents, refused = gather(path)
    assert documents == {}
    expect(
        refused,
        {
            "hub": "lies on a hub ('someone/set') and is not fetched",
            "gone": "no file at",
            "outside": "file ../out.json lies outside",
            "table": "is not JSON, JSON lines, parquet, Arrow or tar; it starts 'a,b",
            "odd": "\"formatting\" is 'poem'; known: alpaca, sharegpt, openai",
            "ranked": "preference data cannot be read",
            "chosen": "\"columns\" has 'chosen', which is not read",
            "lists": '"columns" and "tags" must be objects',
            "tools/record 1": "turn 2 is from 'function_call': calls of tools cannot be read",
            "tools/record 2": 'no "conversations"',
            "tools/record 3": "must be an object, not int",
        },
    )


def test_what_describes_no_sets_is_said(tmp_path: Path) -> None:
    for content, reason in (('{"a": 7}', "describes no data sets"), ("{", "is not JSON")):
        (tmp_path / "dataset_info.json").write_text(content)
        with pytest.raises(ValueError, match=f"llamafactory: .*{reason}"):
            gather(tmp_path, "llamafactory")
    with pytest.raises(ValueError, match="llamafactory: no file at"):
        gather(tmp_path / "nowhere", "llamafactory")
