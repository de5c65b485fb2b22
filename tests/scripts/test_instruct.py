"""Conversations: every answer is true by the metadata, and they do not change between runs."""

from scripts.quickstart.captions import Picture
from scripts.quickstart.instruct import LANGUAGES, QUESTIONS, conversation

BED = Picture(
    "furniture-1",
    "furniture",
    "Iron bed",
    "f.png",
    category="Bedroom",
    names={"fr": "Lit en fer", "de": "Eisenbett"},
    height_cm=99.0,
)


def answers(picture: Picture) -> dict[str, set[str]]:
    """All answers to each kind of question, over many phrasings."""
    kinds: dict[str, set[str]] = {}
    for which in range(200):
        for question, answer in conversation(picture, which):
            kinds.setdefault(kind_of(question), set()).add(answer)
    return kinds


def kind_of(question: str) -> str:
    for code, language in LANGUAGES.items():
        if language in question:
            return code
    return next(kind for kind, forms in QUESTIONS.items() if question in forms)


def test_answers_are_the_metadata() -> None:
    assert answers(BED) == {
        "name": {"Iron bed"},
        "category": {"Bedroom"},
        "room": {"Bedroom"},
        "tall": {"No"},
        "fr": {"Lit en fer"},
        "de": {"Eisenbett"},
    }


def test_what_is_not_known_is_not_asked() -> None:
    bare = Picture("s", "stamps", "A frog.", "s.png", group="animals")
    assert answers(bare) == {"name": {"A frog."}, "group": {"Animal"}}


def test_phrasings_vary_and_seeds_are_fixed() -> None:
    runs = [conversation(BED, which) for which in range(60)]
    assert runs == [conversation(BED, which) for which in range(60)]
    assert len({question for turns in runs for question, _ in turns}) > 15


def test_every_other_conversation_asks_for_the_kind_alone() -> None:
    asked = [[kind_of(q) for q, _ in conversation(BED, which)] for which in range(60)]
    assert set(map(tuple, asked[::2])) == {("category",)}
    assert {kinds[0] for kinds in asked[1::2]} == {"category", "name"}
    assert {len(kinds) for kinds in asked[1::2]} == {2, 3}
