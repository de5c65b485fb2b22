from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from format_toys import (
    ANSWER,
    ASK,
    clip,
    expect,
    gather,
    kinds,
    link,
    spoken,
    talk,
    words,
    write_tar,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_toys import captions, png

from data_packing.document import Document
from data_packing.formats import detect, read
from data_packing.formats.tars import members, unsafe
from data_packing.ledger import Refusal
from data_packing.sharding import write_shards


def sidecar(**record: object) -> bytes:
    return json.dumps(record).encode()


def test_members_of_one_name_are_one_document(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar",
        {
            "./0.png": png(),
            "./0.txt": "\ufeff a bee\nand more \n".encode(),
            "deep/1.PNG": png(seed=1),
            "deep/1.JSON": sidecar(caption="a cat", url="https://example.org/cat"),
            "2.jpg": png(),
            "2.txt": b"text wins",
            "2.json": sidecar(caption="not me", key="2"),
            "3.mp4": clip(),
            "3.txt": b"a clip",
            "4.png": png(),
            "4.json": sidecar(conversations=spoken(("human", ASK), ("gpt", ANSWER))),
            "5.a.png": png(seed=1),
            "5.b.png": png(seed=2),
            "5.json": sidecar(
                messages=talk(("user", "<image> or <image>?"), ("assistant", "The first.")),
                images=["b.png", "5.a.png"],
            ),
            "6.png": png(),
            "6.json": sidecar(
                image="coco/7.jpg", conversations=spoken(("human", ASK), ("gpt", ANSWER))
            ),
            "7.0.png": png(),
            "7.json": sidecar(texts=["before", None], images=[None, "0.png"]),
            "8.json": sidecar(conversations=spoken(("human", "Hello"), ("gpt", "Hi"))),
            "9.png": png(),
            "9.txt": b"with a class",
            "9.cls": b"7",
        },
    )
    documents, refused = gather(tar)
    assert refused == {}
    assert [kinds(document) for document in documents.values()] == (
        ["it", "it", "it", "i" * 8 + "t", "itt", "ititt", "itt", "ti", "tt", "it"]
    )
    assert list(documents)[:2] == ["a/0", "a/deep/1"]
    assert documents["a/0"].source == "a"
    assert words(documents["a/0"]) == [(None, png()), (None, "a bee\nand more")]
    assert words(documents["a/2"])[1] == (None, "text wins")
    assert words(documents["a/5"])[:3] == [
        ("user", png(seed=2)),
        ("user", "or"),
        ("user", png(seed=1)),
    ]


def test_members_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    two = spoken(("human", "<image><image>?"), ("gpt", "No."))
    tar = write_tar(
        tmp_path / "b.tar",
        {
            "/etc/0.png": png(),
            "up/../../1.png": png(),
            "2.png": link(tarfile.SYMTYPE, "/etc/hostname"),
            "3.png": link(tarfile.LNKTYPE, "/etc/hostname"),
            "pipe.png": link(tarfile.FIFOTYPE, ""),
            "4.png": png(),
            "4.txt": "Käfer".encode("latin-1"),
            "5.png": b"",
            "5.txt": b"empty image",
            "6.png": png(),
            "6.txt": b"  ",
            "7.txt": b"alone",
            "8.png": png(),
            "9.png": png(),
            "9.json": b"{half",
            "10.png": png(),
            "10.json": sidecar(conversations=two),
            "11.png": png(),
            "11.json": sidecar(images=["x.png", "y.png"], conversations=two),
            "12.pickle": b"\x80\x04",
            "13.png": png(),
            "13.json": sidecar(conversations=two),
            "13.txt": b"which?",
            "14.png": png()[:30],
            "14.txt": b"cut",
            "8.txt": b"too late",
        },
    )
    documents, refused = gather(tar)
    assert documents == {}
    expect(
        refused,
        {
            "b//etc/0": "an absolute path in the tar",
            "b/up/../../1": "a path with '..' in the tar",
            "b/2": "a symbolic link in the tar",
            "b/3": "a hard link in the tar",
            "b/pipe": "a pipe in the tar",
            "b/4": "the txt is not UTF-8 (byte 1)",
            "b/5": "image 5.png: empty image file (0 bytes)",
            "b/6": "the txt is empty",
            "b/7": "no image or clip beside txt",
            "b/8": "no caption beside png",
            "b/8 (again)": "do not follow the others",
            "b/9": "the json is not JSON",
            "b/10": "2 <image> in the text but 1 image",
            "b/11": "image x.png is not beside the record in the tar",
            "b/12": "no image or clip beside pickle",
            "b/13": "both a caption (txt) and a record (json)",
            "b/14": "image 14.png: ",
        },
    )
    assert sorted(tmp_path.rglob("*")) == [tar]  # nothing was written


@pytest.mark.parametrize("name", ["C:\\x.png", "\\x.png", "a\\..\\b.png", "/x.png", ".."])
def test_paths_that_lead_out_are_unsafe(name: str) -> None:
    assert unsafe(name)
    assert not unsafe("a/b..c/d.png")


def test_a_tar_that_is_cut_short_keeps_what_was_whole(tmp_path: Path) -> None:
    files = {
        f"{n}.{end}": png(seed=n) if end == "png" else b"text" * 200
        for n in range(3)
        for end in ("png", "txt")
    }
    whole = write_tar(tmp_path / "c.tar", files).read_bytes()
    first = 512 + 512 + 512 + 1024  # the header and one block of an image, of 800 bytes of text
    assert len(png()) <= 512
    for length in range(512, 3 * first + 1, 128):
        (tmp_path / "c.tar").write_bytes(whole[:length])
        documents, refused = gather(tmp_path / "c.tar", "webdataset")
        read_whole = (length + 1024 - 800) // first  # the padding of a text may be missing
        assert list(documents) == [f"c/{n}" for n in range(read_whole)], length
        assert "cut short" in list(refused.values())[-1]
    (tmp_path / "c.tar").write_bytes(whole[: 3 * first + 512])
    assert gather(tmp_path / "c.tar")[1] == {}
    (tmp_path / "c.tar").write_bytes(whole[:first] + b"\xaa" * 512 + whole[first + 512 :])
    documents, refused = gather(tmp_path / "c.tar")
    assert list(documents) == ["c/0"]
    assert list(refused) == [f"c/byte {first}"]


def test_what_follows_zeros_in_a_tar_is_read(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "x.tar", {"0.png": png(), "0.txt": b"a bee"}).read_bytes()
    second = write_tar(tmp_path / "x.tar", {"1.png": png(seed=1), "1.txt": b"a cat"}).read_bytes()
    for zeros in (0, 512, 4 << 20):
        (tmp_path / "x.tar").write_bytes(first + bytes(zeros) + second)
        documents, refused = gather(tmp_path / "x.tar")
        assert (list(documents), refused) == (["x/0", "x/1"], {})
        assert words(documents["x/1"]) == [(None, png(seed=1)), (None, "a cat")]
    (tmp_path / "x.tar").write_bytes(first + second[: 2 * 512 + 100])
    documents, refused = gather(tmp_path / "x.tar")
    assert list(documents) == ["x/0"]
    place = len(first) + 1024
    assert [key for key in refused if "byte" in key] == [f"x/byte {place}"]
    assert str(place) not in refused[f"x/byte {place}"]
    (tmp_path / "x.tar").write_bytes(first + b"\xaa" * 1000)
    documents, refused = gather(tmp_path / "x.tar")
    assert list(documents) == ["x/0"]
    expect(refused, {f"x/byte {len(first)}": "no member and no end mark stands here"})
    (tmp_path / "x.tar").write_bytes(first + bytes(100))
    assert gather(tmp_path / "x.tar")[1] == {}


def test_a_header_of_zeros_is_no_end(tmp_path: Path) -> None:
    names = ["0.png", "0.txt", "empty.d", "1.png", "1.txt", "2.png", "2.txt"]
    files = {name: png() if name.endswith("png") else b"a bee" for name in names}
    files["empty.d"] = b""
    whole = bytearray(write_tar(tmp_path / "z.tar", files).read_bytes())
    with tarfile.open(tmp_path / "z.tar") as archive:
        at = {info.name: info.offset for info in archive}
    whole[at["empty.d"] : at["empty.d"] + 512] = bytes(512)
    (tmp_path / "z.tar").write_bytes(whole)
    documents, refused = gather(tmp_path / "z.tar")
    assert (list(documents), refused) == (["z/0", "z/1", "z/2"], {})
    whole[at["1.png"] : at["1.png"] + 512] = bytes(512)
    (tmp_path / "z.tar").write_bytes(whole)
    documents, refused = gather(tmp_path / "z.tar")
    assert list(documents) == ["z/0"]
    expect(refused, {f"z/byte {at['1.png'] + 512}": "the tar is cut short or damaged: no member"})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_of_a_tar_is_an_exception(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "d.tar"
    files = {"0.png": png(), "0.txt": b"a", "é" * 120 + ".png": png(), "1.txt": b"b"}
    content = bytearray(write_tar(path, files).read_bytes()[:5120])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    for member in members(path):
        assert member.fault or isinstance(member.data, bytes)
    if path.stat().st_size and detect_or_none(path) == "webdataset":
        assert all(isinstance(item, Document | Refusal) for item in read(path))


def detect_or_none(path: Path) -> str | None:
    try:
        return detect(path)
    except ValueError:
        return None


def test_many_tars_by_folder_and_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "cc"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number:03d}.tar", {"x.png": png(), "x.txt": b"a bee"})
    keys = ["000/x", "001/x", "002/x"]
    for path in (folder, folder / "{000..002}.tar", folder / "*.tar"):
        assert detect(path) == "webdataset"
        documents, refused = gather(path)
        assert list(documents) == keys
        assert not refused
        assert {document.source for document in documents.values()} == {"cc"}
    for part in ("a", "b"):
        (folder / part).mkdir()
        write_tar(folder / part / "0.tar", {"x.png": png(), "x.txt": b"a bee"})
    documents, refused = gather(folder / "*" / "0.tar")
    assert (list(documents), refused) == (["a/0/x", "b/0/x"], {})
    assert {document.source for document in documents.values()} == {"cc"}
    with pytest.raises(ValueError, match="no shard matches .*003.tar"):
        gather(folder / "{000..003}.tar", "webdataset")
    (folder / "text.tar").write_text("hello")
    with pytest.raises(ValueError, match="webdataset: .*text.tar is not .*starts 'hello'"):
        gather(folder, "webdataset")


def test_our_own_shards_are_said_to_be_such(tmp_path: Path) -> None:
    shard = write_shards(captions(2), tmp_path, "toys").paths[0]
    _, refused = gather(shard)
    assert all("a shard of this project already" in reason for reason in refused.values())
