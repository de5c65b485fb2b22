from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from packing_toys import captions, cost, image, index_of, page

from data_packing.document import Document, DocumentError, Image, Text
from data_packing.executors import Executor
from data_packing.index import build_index, source_names
from data_packing.ledger import Refusal
from data_packing.sample import Cost
from data_packing.sharding import write_shards
from data_packing.shards import index_path


def refuse_long(document: Document) -> Cost:
    if len(document.parts) > 2:
        raise DocumentError("too many parts")
    return cost(document)


def test_the_index_holds_what_every_piece_costs(tmp_path: Path) -> None:
    index = index_of([*captions(2), page([3, 5], images=True)], tmp_path, per_shard=2)
    assert len(index) == 3
    assert index.name == "toys"
    assert index.overhead.tolist() == [1, 1, 1]
    assert index.piece_start.tolist() == [0, 1, 2, 4]
    assert index.piece_text.tolist()[2:] == [3, 5]
    assert index.piece_image_start.tolist() == [0, 1, 2, 3, 4]
    assert index.height.tolist() == [8] * 4
    assert index.width.tolist() == [9] * 4


def test_documents_and_keys_are_found_by_number(tmp_path: Path) -> None:
    documents = list(captions(7))
    index = index_of(documents, tmp_path, per_shard=3)
    copy = pickle.loads(pickle.dumps(index))
    for number in (6, 0, 3, 2):
        assert index.read(number) == copy.read(number) == documents[number]
        assert index.key(number) == documents[number].key
    index.close()
    assert index.read(1) == documents[1]


def test_what_is_refused_is_named_and_costs_nothing(tmp_path: Path) -> None:
    documents = [
        *captions(1),
        page([3, 5], "long", images=True),
        *captions(1, start=5),
        Refusal("raw", "bad", "broken image"),
    ]
    report = write_shards(documents, tmp_path, "toys")
    index = build_index(report.paths, refuse_long, "f")
    assert index.refused == [
        Refusal("toys", "bad", "broken image"),
        Refusal("toys", "long", "too many parts"),
    ]
    assert index.refused_documents == 1
    assert index.piece_start.tolist() == [0, 1, 1, 2]
    assert len(index.height) == 2
    again = build_index(report.paths, refuse_long, "f")
    assert again.refused == index.refused


def test_token_counts_are_cached_by_fingerprint(tmp_path: Path) -> None:
    paths = write_shards(captions(4), tmp_path, "toys", 2).paths
    calls = []

    def counting(document: Document) -> Cost:
        calls.append(document.key)
        return cost(document)

    first = build_index(paths, counting, "f")
    second = build_index(paths, counting, "f")
    assert len(calls) == 4
    assert first.fingerprint == second.fingerprint
    other = build_index(paths, counting, "g")
    assert len(calls) == 8
    assert other.fingerprint != first.fingerprint


def test_a_cache_of_other_shards_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    paths = write_shards(captions(4), tmp_path, "toys").paths
    before = build_index(paths, cost, "f")
    cache = next(tmp_path.glob("*.tokens-*.npz"))
    stale = cache.read_bytes()
    write_shards(captions(4, start=50), tmp_path, "toys")
    assert not cache.exists()
    cache.write_bytes(stale)
    after = build_index(paths, cost, "f")
    assert after.piece_text.tolist() != before.piece_text.tolist()
    cache.write_bytes(b"rubbish")
    assert build_index(paths, cost, "f").fingerprint == after.fingerprint


def test_workers_count_the_same(tmp_path: Path) -> None:
    paths = write_shards(captions(6), tmp_path, "toys", 2).paths
    with_workers = build_index(paths, cost, "f", Executor("local", 2))
    for cache in tmp_path.glob("*.tokens-*"):
        cache.unlink()
    assert build_index(paths, cost, "f").fingerprint == with_workers.fingerprint


def test_unfinished_shards_are_refused(tmp_path: Path) -> None:
    paths = write_shards(captions(4), tmp_path, "toys", 2).paths
    index_path(paths[1]).unlink()
    with pytest.raises(ValueError, match=r"toys-000001\.tar has no index"):
        build_index(paths, cost, "f")
    with pytest.raises(ValueError, match="no shards"):
        build_index([], cost, "f")


def naming(*images: int) -> Callable[[Document], Cost]:
    """A cost of one piece that names these images."""
    return lambda document: Cost(1, ((3, images),))


def clips(*frames: int) -> Document:
    """A picture of height 1 and clips of so many frames of heights 2, 3 and so on."""
    heights = iter(range(2, 100))
    parts = [Image(b"", next(heights), 9, clip=n) for n, k in enumerate(frames, 1) for _ in [0] * k]
    return Document((Image(b"", 1, 9), *parts, Text("xyz")), "toys", "clips")


def test_frames_that_no_piece_names_cost_nothing(tmp_path: Path) -> None:
    last = Document((Image(b"", 50, 9), Text("last")), "toys", "last")
    paths = write_shards([*captions(1), clips(3, 2), last], tmp_path, "toys").paths

    def thin(document: Document) -> Cost:
        return naming(0, 1, 3, 5)(document) if document.key == "clips" else cost(document)

    for _ in range(2):
        index = build_index(paths, thin, "thin")
        assert index.piece_image_start.tolist() == [0, 1, 5, 6]
        assert index.height.tolist() == [8, 1, 2, 4, 6, 50]
    assert build_index(paths, cost, "all").height.tolist() == [8, *range(1, 7), 50]


@pytest.mark.parametrize(
    "named",
    [
        *((), (1, 4), (0, 1, 2, 3), (0, 4, 5), (0, 4, 1), (0, 1, 1, 4), (0, 1, 4, 6), (-1, 1, 4)),
        (0, 1, 4, 4),
    ],
)
def test_a_forgotten_picture_or_clip_is_a_wrong_cost(
    tmp_path: Path, named: tuple[int, ...]
) -> None:
    paths = write_shards([clips(3, 2)], tmp_path, "toys").paths
    with pytest.raises(ValueError, match=r"'clips' names the images .* each of the 6 once"):
        build_index(paths, naming(*named), "f")


def test_pictures_are_no_clip_that_can_go_without_one(tmp_path: Path) -> None:
    paths = write_shards([page([3, 5], images=True)], tmp_path, "toys").paths
    with pytest.raises(ValueError, match=r"names the images \[1\]"):
        build_index(paths, naming(1), "f")


def test_a_cost_function_that_is_wrong_is_caught_with_the_key(tmp_path: Path) -> None:
    paths = write_shards(captions(1), tmp_path, "toys").paths
    with pytest.raises(ValueError, match="'k0' names the images \\[\\]"):
        build_index(paths, lambda document: Cost(1, ((3, ()),)), "f")
    with pytest.raises(RuntimeError, match="'k0': division by zero"):
        build_index(paths, lambda document: 1 / 0, "g")  # type: ignore[arg-type, return-value]


def test_a_document_of_system_parts_alone_is_refused(tmp_path: Path) -> None:
    lonely = Document((Text("rules", "system"),), "toys", "lonely")
    index = index_of([*captions(1), lonely], tmp_path)
    assert [item.key for item in index.refused] == ["lonely"]
    assert "nothing to learn" in index.refused[0].reason


def named(count: int, *names: str) -> list[Document]:
    """Captions `z`, with variants of one length that differ by their letter: a name's first."""
    return [
        Document((image(), Text("z", variants=tuple((n, n[0] * (k + 2)) for n in names))), "t", key)
        for k, key in enumerate(f"k{number}" for number in range(count))
    ]


def test_an_index_of_a_variant_counts_and_reads_it(tmp_path: Path) -> None:
    documents = named(3, "alt", "synthetic")
    paths = write_shards(documents, tmp_path, "toys").paths
    plain, alt, other = (
        build_index(paths, cost, "f", text=text) for text in (None, "alt", "synthetic")
    )
    assert plain.piece_text.tolist() == [1, 1, 1]
    assert alt.piece_text.tolist() == other.piece_text.tolist() == [2, 3, 4]
    assert (plain.text, alt.text, other.text) == (None, "alt", "synthetic")
    assert (plain.name, alt.name, other.name) == ("toys", "toys:alt", "toys:synthetic")
    assert len({index.fingerprint for index in (plain, alt, other)}) == 3
    assert plain.read(1) == documents[1]
    assert alt.read(1) == documents[1].with_variant("alt")
    assert pickle.loads(pickle.dumps(other)).read(2).parts[1] == Text("ssss")


def test_a_document_without_the_variant_is_refused_with_the_reason(tmp_path: Path) -> None:
    documents = [*named(1, "alt"), *captions(1, start=5), *named(3, "de", "alt")[2:]]
    paths = write_shards([*documents, Refusal("raw", "bad", "broken")], tmp_path, "toys").paths
    index = build_index(paths, cost, "f", text="de")
    assert index.refused == [
        Refusal("toys:de", "bad", "broken"),
        Refusal("toys:de", "k0", "no text variant 'de'; it has 'alt'"),
        Refusal("toys:de", "k5", "no text variant 'de'; it has none"),
    ]
    assert index.refused_documents == 2
    assert index.piece_start.tolist() == [0, 0, 0, 1]
    with pytest.raises(DocumentError, match="no text variant"):
        index.read(0)


def test_the_counts_of_one_variant_are_not_those_of_another(tmp_path: Path) -> None:
    paths = write_shards(named(3, "alt", "de"), tmp_path, "toys").paths
    calls = []

    def counting(document: Document) -> Cost:
        calls.append(document.parts[1])
        return cost(document)

    for text, letter in ((None, "z"), ("alt", "a"), ("de", "d")):
        build_index(paths, counting, "f", text=text)
        assert len(calls) == 3, text
        assert {part.text[0] for part in calls if isinstance(part, Text)} == {letter}
        calls.clear()
        build_index(paths, counting, "f", text=text)
        assert not calls
    assert len(list(tmp_path.glob("*.tokens-*.npz"))) == 3
    write_shards(named(2, "alt"), tmp_path, "toys")
    assert not list(tmp_path.glob("*.tokens-*.npz"))


def test_the_cache_of_no_variant_is_what_it_always_was(tmp_path: Path) -> None:
    paths = write_shards(named(2, "alt"), tmp_path, "toys").paths
    build_index(paths, cost, "f")
    (cache,) = tmp_path.glob("*.tokens-*.npz")
    assert cache.name == f"toys-000000.tokens-{hashlib.sha256(b'f').hexdigest()[:16]}.npz"
    assert np.load(cache).files == [
        *("sha256", "overhead", "piece_count", "piece_text", "piece_images", "cost_refused"),
        *("cost_reasons", "cost_reasons_ends"),
    ]


def test_a_source_listed_with_several_variants_has_several_names(tmp_path: Path) -> None:
    shards = [write_shards(named(1, "alt"), tmp_path / name, "toys").paths for name in "ab"]
    a, b = shards
    assert source_names([a, a], ["alt", "de"]) == ["toys:alt", "toys:de"]
    assert source_names([a, a, a], ["alt", None, "alt"]) == ["toys:alt", "toys", "toys:alt (2)"]
    assert source_names([a, b, b], ["alt", "alt", "de"]) == ["a/toys:alt", "b/toys:alt", "toys:de"]


def test_counting_begins_where_it_is_told_and_gives_up_when_it_is(tmp_path: Path) -> None:
    paths = write_shards(captions(40), tmp_path, "toys", 10).paths
    counted: list[str] = []

    def note(document: Document) -> Cost:
        counted.append(document.key)
        return cost(document)

    told: list[int] = []
    index = build_index(paths, note, "begin", begin=0.5, tell=told.append)
    assert told == [4]
    assert counted[::10] == ["k20", "k30", "k0", "k10"]
    again = build_index(paths, note, "begin", begin=0.9, tell=told.append)
    assert (told, len(counted)) == ([4], 40)
    assert again.fingerprint == index.fingerprint
    assert [again.key(number) for number in range(40)] == [f"k{n}" for n in range(40)]
    with pytest.raises(InterruptedError):
        build_index(paths, note, "stop", stop=lambda: True)
    assert len(counted) == 50
