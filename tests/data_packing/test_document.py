from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing_toys import png

from data_packing.document import Document, DocumentError, Image, Text

PICTURE = Image.from_bytes(png())


def parts_of(letters: str) -> tuple[Text | Image, ...]:
    """'i' is an image, every other letter a text of that letter."""
    return tuple(PICTURE if letter == "i" else Text(letter) for letter in letters)


def pieces_as_letters(document: Document) -> list[str]:
    return [
        "".join("i" if isinstance(p, Image) else p.text for p in document.parts[start:stop])
        for start, stop in document.pieces()
    ]


@pytest.mark.parametrize(
    ("letters", "pieces"),
    [
        ("a", ["a"]),
        ("ia", ["ia"]),
        ("aib", ["a", "ib"]),
        ("ab", ["a", "b"]),
        ("iiab", ["iia", "b"]),
        ("aiibic", ["a", "iib", "ic"]),
        ("ai", ["a", "i"]),
    ],
)
def test_raw_documents_are_cut_before_images_and_between_texts(
    letters: str, pieces: list[str]
) -> None:
    assert pieces_as_letters(Document(parts_of(letters))) == pieces


def test_conversation_without_images_is_cut_at_every_user_turn() -> None:
    document = Document.conversation(
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    )
    assert pieces_as_letters(document) == ["ab", "cd"]
    assert [part.text for part in document.select(1, 2).parts] == ["s", "c", "d"]


def test_conversation_with_images_is_cut_only_where_a_turn_brings_its_own() -> None:
    document = Document.conversation(
        [
            ("user", [PICTURE, "a"]),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
            ("user", ["e", PICTURE]),
            ("assistant", "f"),
        ]
    )
    assert pieces_as_letters(document) == ["iabcd", "eif"]


def test_only_what_the_assistant_says_is_learned() -> None:
    document = Document.conversation([("system", "s"), ("user", "u"), ("assistant", "a")])
    assert [part.learned for part in document.parts] == [False, False, True]
    assert Document.caption(PICTURE, "a").parts[1].learned


@given(st.text(alphabet="iab", min_size=1, max_size=20))
def test_pieces_cover_a_raw_document_once_and_never_part_an_image_from_its_text(
    letters: str,
) -> None:
    document = Document(parts_of(letters))
    assert "".join(pieces_as_letters(document)) == letters
    for start, _ in document.pieces()[1:]:
        assert isinstance(document.parts[start - 1], Text)
    count = len(document.pieces())
    assert document.select(0, count) == document


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.lists(st.booleans(), min_size=1)),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_slices_of_a_conversation_cover_it_and_keep_the_system(
    turns: list[tuple[str, list[bool]]], system: bool
) -> None:
    content = [
        (role, [PICTURE if is_image and role == "user" else "t" for is_image in flags])
        for role, flags in turns
    ]
    document = Document.conversation([("system", "s")] * system + content)  # type: ignore[arg-type]
    slices = [document.select(at, at + 1).parts for at in range(len(document.pieces()))]
    assert all(part[:system] == document.parts[:system] for part in slices)
    joined = tuple(part for parts in slices for part in parts[int(system) :])
    assert joined == document.parts[int(system) :]


def test_roles_are_all_or_none() -> None:
    with pytest.raises(DocumentError, match="some have none"):
        Document((Text("a"), Text("b", "user")))
    with pytest.raises(DocumentError, match="unknown role 'robot'"):
        Document((Text("a", "robot"),))  # type: ignore[arg-type]


def test_select_refuses_what_is_not_there() -> None:
    with pytest.raises(IndexError, match="that has 1"):
        Document(parts_of("a")).select(0, 2)


def test_a_missing_image_file_is_named(tmp_path) -> None:
    with pytest.raises(DocumentError, match=r"nowhere\.png: No such file"):
        Image.open(tmp_path / "nowhere.png")


def test_a_document_without_anything_but_the_system_has_no_pieces() -> None:
    assert Document((Text("rules", "system"),)).pieces() == []
    assert Document(()).pieces() == []


def test_a_variant_takes_the_place_of_every_text_that_has_variants() -> None:
    both = Text("a", variants=(("de", "b"), ("alt", "c")))
    document = Document((PICTURE, both, Text("kept"), replace(both, learned=False)), "s", "k")
    chosen = document.with_variant("de")
    assert chosen.parts == (PICTURE, Text("b"), Text("kept"), Text("b", learned=False))
    assert (chosen.source, chosen.key) == ("s", "k")
    assert both == Text("a", variants=(("alt", "c"), ("de", "b")))
    assert hash(both) == hash(Text("a", variants=(("alt", "c"), ("de", "b"))))


def test_a_variant_that_is_missing_is_not_replaced_by_a_neighbour() -> None:
    half = (Text("a", variants=(("de", "b"),)), Text("c", variants=(("alt", "d"), ("fr", "e"))))
    with pytest.raises(DocumentError, match="text 1 has no variant 'alt'; it has 'de'$"):
        Document(half).with_variant("alt")
    with pytest.raises(DocumentError, match="no text variant 'it'; it has 'alt', 'de', 'fr'$"):
        Document(half).with_variant("it")
    with pytest.raises(DocumentError, match="no text variant 'it'; it has none$"):
        Document(parts_of("ia")).with_variant("it")


def test_variants_have_names_of_their_own() -> None:
    with pytest.raises(DocumentError, match="two variants of a text have one name: 'a', 'a'"):
        Text("t", variants=(("a", "x"), ("a", "y")))
    with pytest.raises(DocumentError, match="has no name"):
        Text("t", variants=(("", "x"),))


def test_a_conversation_keeps_the_variants_of_its_texts() -> None:
    answer = Text("a bee", variants=(("de", "eine Biene"),))
    document = Document.conversation([("user", [PICTURE, "what?"]), ("assistant", [answer])])
    assert document.parts[2] == replace(answer, role="assistant")
    assert document.with_variant("de").parts[1:] == (
        Text("what?", "user", learned=False),
        Text("eine Biene", "assistant"),
    )
