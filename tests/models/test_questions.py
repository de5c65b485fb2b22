"""A Q-Former whose queries read what is asked about an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_packing.document import Document
from data_packing.pack import Pack, collate
from mllm.evaluation.scoring import score
from mllm.models.assemble import assemble, load
from mllm.models.connectors import CONNECTORS
from mllm.models.connectors.q_former import LONGEST_TEXT
from mllm.models.modeling import MultimodalModel
from mllm.models.turns import questions
from tests.models.conftest import SMALL, Parts, chat, documents, picture
from tests.models.test_connector_references import blip as blip

TEXT = {**SMALL["q_former"], "text": True}


@pytest.fixture(params=[None, {"tiling": "dynamic", "tiles": 4}], ids=["one view", "tiles"])
def parts(request: pytest.FixtureRequest, build: Callable[..., Parts]) -> Parts:
    return build("clip", "q_former", images=request.param, **TEXT)


def hidden_of(model: MultimodalModel, pack: Pack) -> Tensor:
    images = (pack.pixels, pack.sizes, pack.order, pack.bags, pack.asked)
    hidden: Tensor = model.hidden_states(pack.input_ids, *images, cu_seqlens=pack.cu_seqlens)
    return hidden[0]


def test_what_is_asked_is_the_turn_that_shows_the_image() -> None:
    told = Document.conversation(
        [
            ("system", "Be kind."),
            ("user", ["Look: ", picture(1), "What is ", picture(2), "this?"]),
            ("assistant", "It is a dog."),
            ("user", [picture(3)]),
            ("assistant", "A cat."),
        ]
    )
    assert questions(told) == ["Look: What is this?", "Look: What is this?", ""]
    assert questions(Document.caption(picture(1), "a cat")) == [""]


def test_the_question_changes_what_is_seen_of_its_own_image_only(parts: Parts) -> None:
    model, processor = parts
    tokens = []
    for asked in ("What is this?", "Which room does it belong to?"):
        pack = collate([processor.encode(chat(1, asked)), processor.encode(chat(2))], 0)
        with torch.no_grad():
            tokens.append(model.image_features(pack.pixels, pack.sizes, pack.asked))
    half = len(tokens[0]) // 2
    assert (tokens[0][:half] - tokens[1][:half]).abs().max() > 1e-3
    torch.testing.assert_close(tokens[0][half:], tokens[1][half:], rtol=0, atol=1e-6)


def test_the_answer_is_not_seen(parts: Parts) -> None:
    _, processor = parts
    packs = [collate([processor.encode(chat(1, answer=said))], 0) for said in ("a", "the dog")]
    assert torch.equal(packs[0].asked, packs[1].asked)
    prompt = Document.conversation([("user", [*chat(1).parts[:2]])])
    assert torch.equal(processor.prompt(prompt)["asked"], packs[0].asked)


def test_packed_equals_unpacked(parts: Parts) -> None:
    model, processor = parts
    samples = [processor.encode(one) for one in (*documents(), chat(7, "Which room?"))]
    losses = []
    model.train()
    for batches in ([samples], [[one] for one in samples]):
        total = torch.zeros(())
        for batch in batches:
            pack = collate(batch, 0)
            logits = model.lm_head(hidden_of(model, pack))
            total = total + cross_entropy(logits[:-1], pack.labels[1:], reduction="sum")
        total.backward()
        grown = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        losses.append((total.detach(), grown))
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-5, atol=0)
    assert losses[0][1]["connector.text_projection.weight"].abs().max() > 0
    for name, gradient in losses[0][1].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradient / scale, losses[1][1][name] / scale, rtol=0, atol=1e-5)


def test_text_alone_reaches_every_weight(parts: Parts) -> None:
    model, processor = parts
    model.train()
    hidden_of(model, collate([processor.encode(documents()[-1])], 0)).square().sum().backward()
    untouched = [name for name, weight in model.connector.named_parameters() if weight.grad is None]
    assert not untouched


def test_generation_conversations_and_saved_folders(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load(tmp_path)
    again.generation_config.eos_token_id = None
    asked = [
        Document.conversation([("user", [picture(1), "What is this?"])]),
        Document.conversation([("user", "Which room?")]),
        Document.conversation([("user", [picture(2, 80, 30), picture(3), "It is a dog. Is it?"])]),
    ]
    for beams in (1, 2):
        how: dict[str, Any] = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
        rows = model.generate(**processor.prompts(asked), **how)
        for row, document in zip(rows, asked, strict=True):
            alone = again.generate(**same.prompt(document), **how)[0]
            assert row[-4:].tolist() == alone[-4:].tolist()
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture(1)},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]
    found = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    wanted = processor.prompt(asked[0])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="reads what is asked about an image: hand over"):
        processor(text="<image>What?", images=[picture(1)])


def test_scores_of_one_image_asked_twice(parts: Parts) -> None:
    model, processor = parts
    several = [chat(1, "What is this?"), chat(1, "Which room?"), chat(1, "Which room?", "a dog")]
    together = score(model, processor, several)
    alone = [score(model, processor, [one])[0] for one in several]
    for (nll, count), (expected, same) in zip(together, alone, strict=True):
        assert count == same
        assert nll == pytest.approx(expected, rel=1e-4)


def test_it_starts_from_a_blip2_without_text(blip: Path, folders: dict[str, Path]) -> None:
    kind: Any = CONNECTORS["q_former"]
    spec = kind.spec_from_folder({"name": "q_former", "path": str(blip), "text": True})
    plain = kind.spec_from_folder({"name": "q_former", "path": str(blip)})
    assert spec == {**plain, "text": True}
    from tests.models.test_connector_references import TEXT as WIDTH
    from tests.models.test_connector_references import VISION

    reads, before = kind(spec, VISION, WIDTH), kind(plain, VISION, WIDTH)
    reads.load_weights(blip)
    before.load_weights(blip)
    own = reads.state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(own[name], value)
    mlp = "qformer.encoder.layer.0.{}.dense.weight"
    assert torch.equal(own[mlp.format("intermediate")], own[mlp.format("intermediate_query")])
    features = torch.randn(10, VISION)
    nothing = torch.zeros(2, 1, WIDTH), torch.zeros(2, 1, dtype=torch.bool)
    grids = [(1, 5), (1, 5)]
    torch.testing.assert_close(reads(features, grids, *nothing), before(features, grids))


def test_a_long_question_is_read_as_far_as_there_are_positions(parts: Parts) -> None:
    model, processor = parts
    pack = collate([processor.encode(chat(1, "What is this? " * 200))], 0)
    assert pack.asked.shape[1] > LONGEST_TEXT
    with torch.no_grad():
        whole = model.image_features(pack.pixels, pack.sizes, pack.asked)
        cut = model.image_features(pack.pixels, pack.sizes, pack.asked[:, :LONGEST_TEXT])
    torch.testing.assert_close(whole, cut)


def test_it_needs_visual_tokens_as_wide_as_embeddings(folders: dict[str, Path]) -> None:
    section = {
        "encoder": {"name": "clip", "path": folders["clip"]},
        "connector": {"name": "q_former", **TEXT},
        "language_model": {"path": folders["llama"]},
        "fusion": {"name": "deepstack", "layers": [0]},
    }
    with pytest.raises(ValueError, match="text needs visual tokens as wide as token embeddings"):
        assemble(section)
