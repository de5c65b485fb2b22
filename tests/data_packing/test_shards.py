from __future__ import annotations

import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_toys import captions, image, page, png

from data_packing import shard_file
from data_packing.document import Document, DocumentError, Image, Text
from data_packing.files import save_arrays
from data_packing.ledger import Refusal
from data_packing.sharding import write_shards
from data_packing.shards import expand, index_path, parse_span, read_document, read_index


def test_documents_come_back_as_they_were_written(tmp_path: Path) -> None:
    documents = [
        *captions(5),
        page([3, 4], "page", images=True),
        Document.conversation(
            [("system", "be kind"), ("user", [image(seed=3), "who?"]), ("assistant", "me")],
            "talk",
            "ключ/with.dots and spaces",
        ),
        Document((Text("not learned", learned=False),), "other", "k" * 300),
    ]
    report = write_shards(iter(documents), tmp_path, "mixed", documents_per_shard=3)
    assert (report.documents, report.images, len(report.paths)) == (8, 8, 3)
    back = [
        read_document(path, at)
        for path in report.paths
        for at in range(len(read_index(path)["offset"]))
    ]
    assert back == documents
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


def test_the_tar_is_laid_out_as_webdataset_wants_it(tmp_path: Path) -> None:
    document = Document.caption(image(), "a", "s", "folder/cat.1")
    write_shards([document, *captions(1)], tmp_path, "s")
    with tarfile.open(tmp_path / "s-000000.tar") as tar:
        names = tar.getnames()
        first = tar.extractfile(names[1])
        assert first is not None
        assert first.read() == png()
    groups = [name.split(".", 1) for name in names]
    assert [extension for _, extension in groups] == ["json", "0.png", "json", "0.png"]
    assert groups[0][0] == groups[1][0] != groups[2][0]
    assert all("/" not in name for name in names)


def test_the_same_documents_make_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shards(captions(5), tmp_path / folder, "s")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bad_records_are_reported_and_kept_in_the_index(tmp_path: Path) -> None:
    documents = [
        Refusal("raw", "early", "broken"),
        *captions(2),
        *captions(1),
        Document((), "toys", "empty"),
        Document((Text("a"),), "toys", ""),
        Document((Text("\ud800"),), "toys", "half"),
        Refusal("raw", "late", "broken"),
    ]
    report = write_shards(documents, tmp_path, "s", documents_per_shard=2)
    assert [(item.key, item.reason) for item in report.refused] == [
        ("early", "broken"),
        ("k0", "duplicate key: an earlier document has the same one"),
        ("empty", "the document is empty"),
        ("?", "the document has no key"),
        ("half", "text holds half a character (surrogate)"),
        ("late", "broken"),
    ]
    assert report.documents == 2
    stored = [bytes(read_index(path)["refused_keys"]).decode() for path in report.paths]
    assert stored == ["early", "k0", "empty?", "halflate"]


def test_no_usable_document_is_an_error_with_reasons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable document.*\n  k: why not"):
        write_shards([Refusal("s", "k", "why not")], tmp_path, "s")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writing_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    def broken_off() -> Iterator[Document]:
        yield from captions(5)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_shards(broken_off(), tmp_path, "s", documents_per_shard=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == []
    write_shards(captions(5), tmp_path, "s")
    index_path(tmp_path / "s-000000.tar").unlink()  # as a kill before the index leaves it
    with pytest.raises(ValueError, match="has no index beside it .* interrupted"):
        read_index(tmp_path / "s-000000.tar")


def test_shards_stay_until_the_new_ones_are_whole(tmp_path: Path) -> None:
    def broken_off() -> Iterator[Document]:
        yield from captions(3)
        raise ValueError("typo is not a folder")

    write_shards(captions(5), tmp_path, "s")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for bad in (broken_off(), iter(())):
        with pytest.raises(ValueError):
            write_shards(bad, tmp_path, "s")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_between_two_indexes_leaves_no_part_of_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_at_the_second(path: Path, arrays: dict[str, object]) -> None:
        if path.name.startswith("s-000001"):
            raise OSError(28, "No space left on device")
        save_arrays(path, arrays)

    monkeypatch.setattr(shard_file, "save_arrays", full_at_the_second)
    with pytest.raises(OSError, match="No space left") as refusal:
        write_shards(captions(6), tmp_path, "s", documents_per_shard=2)
    assert refusal.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_writing_again_replaces_all_shards_of_the_name_and_no_others(tmp_path: Path) -> None:
    write_shards(captions(5), tmp_path, "s", documents_per_shard=1)
    write_shards(captions(1), tmp_path, "s-2")
    (tmp_path / ".s-000009.tar.123-ab.tmp").touch()
    write_shards(captions(2), tmp_path, "s", documents_per_shard=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "s-000000.index.npz",
        "s-000000.tar",
        "s-000001.index.npz",
        "s-000001.tar",
        "s-2-000000.index.npz",
        "s-2-000000.tar",
    ]


def test_a_tar_that_disagrees_with_its_index_is_refused(tmp_path: Path) -> None:
    path = write_shards(captions(3), tmp_path, "s").paths[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-700])
    with pytest.raises(ValueError, match="truncated"):
        read_index(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="another one"):
        read_index(path)
    with pytest.raises(ValueError, match="no shard at"):
        read_index(tmp_path / "nowhere.tar")


def test_a_damaged_index_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    path = write_shards(captions(3), tmp_path, "s").paths[0]
    index = index_path(path)
    good = dict(np.load(index))
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        read_index(path)
    index.write_bytes(pickle.dumps({"version": 1}))
    with pytest.raises(ValueError, match="damaged"):
        read_index(path)

    marker = tmp_path / "unpickled"

    class Bad:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    good["keys"] = np.array([Bad()], dtype=object)
    np.savez(index, allow_pickle=True, **good)
    with pytest.raises(ValueError, match="damaged"):
        read_index(path)
    assert not marker.exists()
    np.savez(index, version=99)
    with pytest.raises(ValueError, match="not an index of version 2"):
        read_index(path)


def span_of(path: Path) -> bytes:
    arrays = read_index(path)
    start, size = int(arrays["offset"][0]), int(arrays["size"][0])
    return path.read_bytes()[start : start + size]


def test_damaged_bytes_are_refused_with_a_reason(tmp_path: Path) -> None:
    span = span_of(write_shards(captions(1), tmp_path, "s").paths[0])
    assert parse_span(span).key == "k0"
    for damaged in (span[:-600], b"\0" * 512 + span, span[:700] + b"\xff" * 40 + span[740:], b""):
        with pytest.raises(DocumentError, match="damaged shard"):
            parse_span(damaged)


@pytest.mark.parametrize("name", ["../../escape.json", "/etc/escape.json"])
def test_a_hostile_archive_writes_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link = tarfile.TarInfo("a.0.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    text = json.dumps({"key": "k", "source": "", "parts": [{"image": "0.png"}]}).encode()
    info = tarfile.TarInfo(name)
    info.size = len(text)
    span = info.tobuf() + text.ljust(512, b"\0") + link.tobuf()
    with pytest.raises(DocumentError):
        parse_span(span)
    assert list(tmp_path.iterdir()) == []


def test_reading_past_the_end_is_refused(tmp_path: Path) -> None:
    path = write_shards(captions(1), tmp_path, "s").paths[0]
    with pytest.raises(IndexError, match="document 1 of .*, which has 1"):
        read_document(path, 1)


def test_names_and_sizes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        write_shards(captions(1), tmp_path, "../up")
    with pytest.raises(ValueError, match="at least 1"):
        write_shards(captions(1), tmp_path, "s", documents_per_shard=0)


def test_expand(tmp_path: Path) -> None:
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b-000.tar", "b-000.index.npz"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand(f"{tmp_path}/{pattern}")]

    assert names("a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names("a-{001..002}.tar") == ["a-001.tar", "a-002.tar"]
    assert names("{b,a}-000.tar") == ["a-000.tar", "b-000.tar"]
    assert names("{a,b}-*.tar") == [*names("a-*.tar"), "b-000.tar"]
    assert names("") == [*names("a-*.tar"), "b-000.tar"]
    with pytest.raises(ValueError, match=r"no shard matches .*c-\*\.tar"):
        names("c-*.tar")
    with pytest.raises(ValueError, match=r"no shard matches .*a-003\.tar"):
        names("a-{000..003}.tar")
    with pytest.raises(ValueError, match="counts down"):
        names("a-{003..000}.tar")


def test_an_image_of_an_unknown_kind_keeps_its_bytes(tmp_path: Path) -> None:
    document = Document((Image(b"odd", 1, 1),), "s", "k")
    path = write_shards([document], tmp_path, "s").paths[0]
    assert read_document(path, 0) == document


TEXTS = st.builds(
    Text,
    st.text(),
    learned=st.booleans(),
    variants=st.dictionaries(st.text(min_size=1), st.text(), max_size=3).map(
        lambda named: tuple(named.items())
    ),
)


@settings(max_examples=50, deadline=None)
@given(documents=st.lists(st.lists(TEXTS | st.builds(image), min_size=1), min_size=1, max_size=4))
def test_variants_come_back_as_they_were_written(
    documents: list[list[Text | Image]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    written = [Document(tuple(parts), "s", f"k{n}") for n, parts in enumerate(documents)]
    path = write_shards(written, tmp_path_factory.mktemp("shards"), "s").paths[0]
    assert [read_document(path, n) for n in range(len(written))] == written


def test_documents_without_variants_have_the_bytes_that_they_always_had(tmp_path: Path) -> None:
    plain, named = Text("a"), Text("b", variants=(("de", "c"),))
    path = write_shards([Document((plain, named), "s", "k")], tmp_path, "s").paths[0]
    with tarfile.open(path) as tar:
        member = tar.extractfile("k.json")
        assert member is not None
        assert member.read() == (
            b'{"key": "k", "source": "s", "parts": ['
            b'{"text": "a", "role": null, "learned": true}, '
            b'{"text": "b", "role": null, "learned": true, "variants": {"de": "c"}}]}'
        )


def test_a_span_is_read_with_one_variant(tmp_path: Path) -> None:
    document = Document((Text("a", variants=(("de", "b"),)),), "s", "k")
    span = span_of(write_shards([document], tmp_path, "s").paths[0])
    assert parse_span(span) == document
    assert parse_span(span, text="de") == document.with_variant("de")
    with pytest.raises(DocumentError, match="no text variant 'fr'; it has 'de'"):
        parse_span(span, text="fr")


@pytest.mark.parametrize("odd", ["5", "[1]", "null", '"de"', '{"": "x"}'])
def test_variants_that_are_no_mapping_are_damage(tmp_path: Path, odd: str) -> None:
    document = Document((Text("a", variants=(("de", "b"),)),), "s", "k")
    span = span_of(write_shards([document], tmp_path, "s").paths[0])
    old = b'{"de": "b"}'
    assert old in span
    damaged = span.replace(old, odd.encode().ljust(len(old)))
    with pytest.raises(DocumentError, match="damaged shard|has no name"):
        parse_span(damaged)


@pytest.mark.parametrize("variant", [("\ud800", "a"), ("de", "\ud800")])
def test_half_a_character_in_a_variant_is_refused(variant: tuple[str, str], tmp_path: Path) -> None:
    odd = Document((Text("a", variants=(variant,)),), "toys", "half")
    (refusal,) = write_shards([*captions(1), odd], tmp_path, "s").refused
    assert (refusal.key, refusal.reason) == ("half", "text holds half a character (surrogate)")
