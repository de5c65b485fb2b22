from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_packing.document import Document, DocumentError
from data_packing.pack import join_views
from mllm.evaluation.scoring import Row, plant, score, text_loss
from tests.evaluation.conftest import square
from tests.evaluation.tiny import make_model

ANSWERS = ("red", "red chair", "a small green parrot", "redder")


@pytest.fixture(scope="module", params=["in_sequence", "cross_attention"])
def parts(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Any, Any]:
    return make_model(tmp_path_factory.mktemp("parts"), request.param)


def asked(colour: str, answer: str) -> Document:
    return Document.conversation(
        [("user", [square(colour), "What is this?"]), ("assistant", answer)]
    )


def documents() -> list[Document]:
    trees = [asked(colour, answer) for colour in ("red", "blue") for answer in ANSWERS]
    captions = [Document.caption(square("gold"), text) for text in ANSWERS]
    talk = Document.conversation([("user", "Which room?"), ("assistant", "the red room")])
    return [*trees, *captions, talk]


def by_hand(model: Any, processor: Any, document: Document) -> tuple[float, int]:
    """The plain forward pass of one document."""
    sample = processor.encode(document)
    pixels, sizes = join_views(sample.pixels)
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.input_ids)[None], pixels, sizes).logits[0]
    labels = torch.from_numpy(sample.labels)
    nll = torch.nn.functional.cross_entropy(
        logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
    )
    return float(nll), int((labels[1:] != -100).sum())


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_scores_equal_plain_forward_passes(parts: tuple[Any, Any], batch_tokens: int) -> None:
    model, processor = parts
    scores = score(model, processor, documents(), batch_tokens)
    for document, (nll, count) in zip(documents(), scores, strict=True):
        expected, learned = by_hand(model, processor, document)
        assert count == learned
        assert nll == pytest.approx(expected, abs=2e-4)


def test_the_image_matters(parts: tuple[Any, Any]) -> None:
    (red, _), (blue, _) = score(*parts, [asked("red", "a chair"), asked("blue", "a chair")])
    assert abs(red - blue) > 1e-3


def test_candidates_share_their_beginning(parts: tuple[Any, Any]) -> None:
    _, processor = parts
    trees = plant(processor, documents())
    assert [len(tree.numbers) for tree in trees] == [4, 4, 4, 1]
    whole = sum(len(processor.encode(document).input_ids) for document in documents())
    assert sum(tree.length for tree in trees) < 0.6 * whole
    assert [len(tree.samples[0].pixels) for tree in trees] == [1, 1, 1, 0]


def test_no_candidate_sees_another(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    alone = score(model, processor, [asked("red", "red chair")])[0]
    beside = score(model, processor, [asked("red", "a parrot"), asked("red", "red chair")])[1]
    assert beside[0] == pytest.approx(alone[0], abs=1e-4)


def test_a_mask_row_is_built_as_said(parts: tuple[Any, Any]) -> None:
    row = Row(tree=[0, 0, 0, 0, 1], branch=[-1, 0, 0, 1, -1])
    assert row.mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert row.bounds().tolist() == [0, 4, 5]


def test_windows_are_not_shared(tmp_path: Path, parts: tuple[Any, Any]) -> None:
    _, processor = parts
    assert all(len(tree.numbers) == 1 for tree in plant(processor, documents(), share=False))


def test_a_document_with_nothing_to_learn_is_named(parts: tuple[Any, Any]) -> None:
    document = asked("red", "chair")
    silent = replace(
        document,
        parts=tuple(
            replace(p, learned=False) if hasattr(p, "learned") else p for p in document.parts
        ),
    )
    with pytest.raises(ValueError, match="document 2 of 2 has no learned token"):
        score(*parts, [document, silent])


def test_a_broken_image_is_an_error_not_a_number(parts: tuple[Any, Any]) -> None:
    image = replace(square("red"), data=square("red").data[:40])
    with pytest.raises(DocumentError, match="image 1"):
        score(*parts, [Document.caption(image, "a chair")])


@pytest.fixture
def uniform(parts: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The model with a head of zeros: every token has the probability 1 / V."""
    model, processor = parts
    head = model.get_output_embeddings()
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.zero_()
    yield model, processor
    with torch.no_grad():
        head.weight.copy_(before)


def test_a_uniform_model_pays_the_logarithm_of_the_vocabulary(uniform: tuple[Any, Any]) -> None:
    each = float(torch.tensor(uniform[0].get_input_embeddings().num_embeddings).log())
    for nll, count in score(*uniform, documents()):
        assert nll == pytest.approx(each * count, rel=1e-5)
    loss, windows = text_loss(uniform[0].language_model, uniform[1].tokenizer, "the cat sat " * 99)
    assert loss == pytest.approx(each, rel=1e-5)
    assert len(windows) > 1


def test_text_loss_scores_every_token_but_the_first(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    text = "the cat sat on a red chair " * 9
    tokens = len(processor.tokenizer(text).input_ids)
    for window in (7, 10_000):
        _, windows = text_loss(model.language_model, processor.tokenizer, text, window)
        assert sum(count for _, count in windows) == tokens - 1
    _, some = text_loss(model.language_model, processor.tokenizer, text, 7, max_tokens=20)
    assert sum(count for _, count in some) == 20


def test_text_loss_refuses_an_empty_text(parts: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="too short"):
        text_loss(parts[0].language_model, parts[1].tokenizer, "")


def test_scoring_leaves_the_mode_of_the_model_alone(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    model.train()
    score(model, processor, [asked("red", "chair")])
    assert model.training
    model.eval()
