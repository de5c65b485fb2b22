from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_packing.captions import normalised
from mllm.evaluation.heldout import blank_image, by_caption, read_heldout
from tests.evaluation.conftest import held


def test_reads_what_was_written(data_folder: Path) -> None:
    examples = read_heldout(data_folder / "heldout" / "captions.json")
    assert examples == held(10, ("Warm", "Cold"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "expected a list"),
        ("[3]", "record 1: expected an object"),
        ('[{"key": "a", "source": "b"}]', "record 1: image, caption missing"),
        (json.dumps([{"key": 1, "source": "b", "image": "no.png", "caption": "c"}]), "no.png"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_heldout(path)


def test_the_same_caption_in_other_words() -> None:
    assert normalised("A Chair, 2.") == normalised("the chair 14") == "chair"
    assert normalised("Chair") != normalised("Chairs")
    assert normalised("42") == "42"


def test_groups_by_caption() -> None:
    assert by_caption(held(12)) == [[0, 10], [1, 11], *([i] for i in range(2, 10))]


def test_the_blank_image_is_white() -> None:
    from data_packing.images import decode

    pixels = decode(blank_image(8).data)
    assert pixels.shape == (8, 8, 3)
    assert pixels.min() == 255
