"""Promise 8: one rule turns a document into token ids, in training and in chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_packing.document import Document, DocumentError, Text
from data_packing.formats import read
from data_packing.index import build_index
from data_packing.sample import IGNORED
from data_packing.sharding import write_shards
from mllm.models.geometry import ImageGeometry
from mllm.models.processor import Processor
from tests.models.conftest import CHATML, chat, documents, make_tokenizer, picture

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}"
    "{% endif %}{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ '<|im_start|>[INST] ' + ('<<SYS>>' + system + '<</SYS>>' if loop.first and system else '')"
    " + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' <|im_end|>' }}"
    "{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
    "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def make_processor(chat_template: str | None = CHATML, tokens: int = 4) -> Processor:
    tokenizer = make_tokenizer(chat_template)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    geometry = ImageGeometry(32, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Processor(tokenizer, geometry, {"name": "average_pool", "visual_tokens": tokens})


def learned_text(processor: Processor, document: Document) -> str:
    labels = processor.encode(document).labels
    return str(processor.decode(labels[labels != IGNORED]))


def two_turns(system: str | None = None) -> Document:
    turns: list[Any] = [("system", system)] if system else []
    return Document.conversation(
        [
            *turns,
            ("user", [picture(1), "\nWhat is this?"]),
            ("assistant", "It is a dog."),
            ("user", ["And ", picture(2), " this?"]),
            ("assistant", "the cat"),
        ]
    )


def expanded(processor: Processor, ids: list[int]) -> list[int]:
    each = processor.image_cost(32, 32)[0]
    image = processor.image_token_id
    return [token for one in ids for token in [one] * (each if one == image else 1)]


@pytest.mark.parametrize("system", [None, "You speak of animals."])
def test_ids_are_those_of_the_chat_template(system: str | None) -> None:
    processor = make_processor()
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": "It is a dog."},
        {"role": "user", "content": "And <image> this?"},
        {"role": "assistant", "content": "the cat"},
    ]
    wanted = processor.tokenizer.apply_chat_template(messages, return_dict=False)
    sample = processor.encode(two_turns(system))
    assert sample.input_ids.tolist() == expanded(processor, wanted)
    assert [slot.length for slot in sample.slots] == [4, 4]
    assert [slot.grid for slot in sample.slots] == [(2, 2), (2, 2)]
    for slot in sample.slots:
        inside = sample.input_ids[slot.start : slot.start + slot.length]
        assert (inside == processor.image_token_id).all()
    assert (sample.input_ids == processor.image_token_id).sum() == 8


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
def test_a_prompt_is_how_the_training_text_begins(template: str) -> None:
    processor = make_processor(template)
    whole = processor.encode(two_turns())
    for stop in (2, 6):
        asked = Document(two_turns().parts[:stop])
        prompt = processor.prompt(asked)["input_ids"][0].tolist()
        assert whole.input_ids[: len(prompt)].tolist() == prompt
        assert whole.labels[len(prompt)] != IGNORED
        assert whole.labels[len(prompt) - 1] == IGNORED


def test_only_answers_and_their_ends_are_learned() -> None:
    processor = make_processor()
    assert learned_text(processor, two_turns()) == "It is a dog.<|im_end|>the cat<|im_end|>"


def test_without_an_end_of_turn_token_the_whole_answer_is_learned() -> None:
    processor = make_processor(NO_END)
    assert learned_text(processor, two_turns()) == "It is a dog.\nthe cat\n"


def test_an_answer_can_be_left_out() -> None:
    parts = list(two_turns().parts)
    parts[2] = Text("It is a dog.", "assistant", learned=False)
    processor = make_processor()
    assert learned_text(processor, Document(tuple(parts))) == "the cat<|im_end|>"


def test_what_the_user_says_is_never_learned() -> None:
    document = Document((Text("Hi", "user", learned=True), Text("the cat", "assistant")))
    assert learned_text(make_processor(), document) == "the cat<|im_end|>"


def test_the_default_system_prompt_is_kept_and_not_learned() -> None:
    processor = make_processor()
    sample = processor.encode(chat(1))
    text = processor.decode(sample.input_ids)
    assert text.startswith("<|im_start|>system\nYou are a small helper<|im_end|>\n")
    start = len(processor.tokenizer(text.split("<|im_start|>user")[0])["input_ids"])
    assert (sample.labels[:start] == IGNORED).all()


def test_a_raw_document() -> None:
    processor = make_processor()
    document = Document(
        (*Document.caption(picture(1), "a red chair").parts, Text(" skipped", learned=False))
    )
    sample = processor.encode(document)
    ids = [
        *[processor.image_token_id] * 4,
        *processor.tokenizer("a red chair")["input_ids"],
        *processor.tokenizer(" skipped")["input_ids"],
        processor.tokenizer.eos_token_id,
    ]
    assert sample.input_ids.tolist() == ids
    assert learned_text(processor, document) == "a red chair"
    assert learned_text(processor, Document((Text("a chair"),))) == "a chair<|im_end|>"
    opened = processor.prompt(Document((document.parts[0],)))["input_ids"][0]
    assert opened.tolist() == [processor.image_token_id] * 4


def test_a_begin_token_is_written_when_the_tokenizer_adds_one() -> None:
    from tokenizers.processors import TemplateProcessing

    processor = make_processor()
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    again = Processor(processor.tokenizer, processor.geometry, processor.connector)
    document = Document((Text("a chair"), Text("the cat")))
    ids = again.encode(document).input_ids.tolist()
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert again.cost(document).overhead == 2
    conversation = again.encode(chat(1)).input_ids
    assert conversation.tolist() == processor.encode(chat(1)).input_ids.tolist()


@pytest.mark.parametrize("token", ["<image>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_special_token_in_a_text_is_refused(token: str) -> None:
    processor = make_processor()
    for document in (
        Document((Text(f"a {token} b"),)),
        Document.conversation([("user", f"x{token}"), ("assistant", "y")]),
    ):
        with pytest.raises(DocumentError, match="special token"):
            processor.encode(document)
        with pytest.raises(DocumentError, match="special token"):
            processor.cost(document)


def test_refusals_name_their_reason() -> None:
    processor = make_processor()
    answered = Document.conversation([("user", "Hi"), ("assistant", "the cat")])
    half = Document((Text("Hi", "user"), Text("a", "assistant"), Text("b", "assistant", False)))
    shown = Document((picture_of("system"), Text("Hi", "user")))
    for bad, reason in (
        (Document(()), "empty document"),
        (half, "as a whole or not at all"),
        (shown, "system prompt"),
    ):
        with pytest.raises(DocumentError, match=reason):
            processor.encode(bad)
    with pytest.raises(DocumentError, match="ends with the user's turn"):
        processor.prompt(answered)
    with pytest.raises(ValueError, match="no chat template"):
        make_processor(None).encode(answered)
    with pytest.raises(DocumentError, match="writes earlier turns differently"):
        make_processor(FORGETFUL).encode(two_turns())
    merging = Document.conversation([("user", "Hi"), ("assistant", "\n\nthe cat")])
    with pytest.raises(DocumentError, match="inside a token"):
        processor.encode(merging)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, NO_END])
@pytest.mark.parametrize("system", [None, "You speak of animals."])
def test_a_conversation_that_begins_with_the_assistant(template: str, system: str | None) -> None:
    processor = make_processor(template)
    turns: list[Any] = [("assistant", "What is this?"), ("user", "the cat"), ("assistant", "dog")]
    document = Document.conversation(turns)
    for refuse in (processor.cost, processor.encode):
        with pytest.raises(DocumentError, match="begins with an answer, and nothing asks for it"):
            refuse(document)
    greeting = Text("What is this?", "assistant", learned=False)
    leading = (Text(system, "system"),) if system and template == CHATML else ()
    unlearned = Document((*leading, greeting, *document.parts[1:]))
    messages = [{"role": part.role, "content": part.text} for part in unlearned.parts]  # type: ignore[union-attr]
    sample = processor.encode(unlearned)
    assert sample.input_ids.tolist() == processor.tokenizer.apply_chat_template(
        messages, return_dict=False
    )
    prompt = processor.prompt(Document(unlearned.parts[:-1]))["input_ids"][0].tolist()
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    learned = sample.labels != IGNORED
    assert "What" not in learned_text(processor, unlearned)
    assert learned_text(processor, unlearned).strip().startswith("dog")
    assert not learned[: len(prompt)].any()
    assert_every_slice_is_priced(processor, unlearned)


def test_a_record_that_begins_with_the_assistant_is_refused_alone(tmp_path: Path) -> None:
    spoken = [{"from": who, "value": "Hi"} for who in ("gpt", "human", "gpt")]
    lines = [json.dumps({"id": str(n), "conversations": spoken[n:]}) for n in range(2)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    documents = [item for item in read(tmp_path / "talk.jsonl") if isinstance(item, Document)]
    paths = write_shards(documents, tmp_path / "out", "talk").paths
    index = build_index(paths, make_processor().cost, "one")
    assert [item.key for item in index.refused] == ["0"]
    assert index.refused_documents == 1
    assert "begins with an answer" in index.refused[0].reason


@pytest.mark.parametrize(
    "failing",
    [
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[0]['content'] % 1 }}",
        "{{ '%d' % messages[0]['content'] }}",
        "{{ messages[0]['content'].index('?') }}",
        "{{ 1 // (messages[0]['content'] | length - 2) }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_fails_on_a_document_refuses_it(failing: str) -> None:
    processor = make_processor(failing)
    document = Document.conversation([("user", "Hi"), ("assistant", "the cat")])
    with pytest.raises(DocumentError, match="the chat template (fails on|refuses) it: "):
        processor.cost(document)


def test_a_system_prompt_alone_is_refused() -> None:
    document = Document((Text("You speak of animals.", "system", learned=False),))
    with pytest.raises(DocumentError, match="nothing but a system prompt"):
        make_processor().cost(document)


def picture_of(role: Any) -> Any:
    from dataclasses import replace

    return replace(picture(1), role=role)


# -- cost ------------------------------------------------------------------------------------------


def priced(processor: Processor, document: Document, start: int, stop: int) -> int:
    cost = processor.cost(document)
    total = cost.overhead
    for text, images in cost.pieces[start:stop]:
        total += text
        for image in images:
            picked = document.images[image]
            total += processor.image_cost(picked.height, picked.width)[0]
    return total


def assert_every_slice_is_priced(processor: Processor, document: Document) -> None:
    cost, pieces = processor.cost(document), len(document.pieces())
    assert len(cost.pieces) == pieces
    assert [i for _, images in cost.pieces for i in images] == list(range(len(document.images)))
    for start in range(pieces):
        for stop in range(start + 1, pieces + 1):
            sliced = document.select(start, stop)
            length = len(processor.encode(sliced).input_ids)
            assert priced(processor, document, start, stop) == length, (start, stop)


def long_chat(system: str | None = None, images: bool = True) -> Document:
    turns: list[Any] = [("system", system)] if system else []
    for number in range(4):
        brings = images and number != 2
        question = [picture(number), "\nWhat is this?"] if brings else f"And number {number}?"
        turns += [("user", question), ("assistant", f"It is a dog of {number}.")]
    return Document.conversation(turns)


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
@pytest.mark.parametrize("system", [None, "You speak of animals."])
@pytest.mark.parametrize("images", [True, False])
def test_the_cost_of_every_slice_of_a_conversation(
    template: str, system: str | None, images: bool
) -> None:
    processor = make_processor(template)
    assert_every_slice_is_priced(processor, long_chat(system, images))


def test_the_cost_of_every_slice_of_a_page() -> None:
    processor = make_processor()
    for document in documents():
        assert_every_slice_is_priced(processor, document)
    first = Document.caption(picture(1), "the cat").parts
    second = Document.caption(picture(2), "a red chair\n").parts
    page = Document((Text("Which room?"), *first, Text(" sat"), *second, picture(3)))
    assert len(page.pieces()) > 3
    assert_every_slice_is_priced(processor, page)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(WORDS, min_size=1, max_size=5), places=st.lists(st.booleans(), min_size=5))
def test_the_cost_of_any_page(texts: list[str], places: list[bool]) -> None:
    parts: list[Any] = []
    for text, place in zip(texts, places, strict=False):
        parts += [picture(1, 8, 8)] if place else []
        parts.append(Text(text))
    document = Document(tuple(parts))
    if reason := refusal(document):
        assert "special token" in reason
    else:
        assert_every_slice_is_priced(PROCESSOR, document)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_the_cost_of_any_conversation(turns: list[tuple[str, str]]) -> None:
    said: list[Any] = []
    for question, answer in turns:
        said += [("user", question), ("assistant", answer)]
    document = Document.conversation(said)
    if reason := refusal(document):
        assert "special token" in reason or "inside a token" in reason
        return
    assert_every_slice_is_priced(PROCESSOR, document)
    messages = [{"role": role, "content": text} for role, text in said]
    wanted = PROCESSOR.tokenizer.apply_chat_template(messages, return_dict=False)
    assert PROCESSOR.encode(document).input_ids.tolist() == wanted


def refusal(document: Document) -> str:
    try:
        PROCESSOR.encode(document)
    except DocumentError as error:
        return str(error)
    return ""


PROCESSOR = make_processor()


def test_left_padded_prompts() -> None:
    processor = make_processor()
    asked = [Document(chat(1).parts[:2]), Document((Text("Hi", "user"),))]
    batch = processor.prompts(asked)
    for row, mask, document in zip(batch["input_ids"], batch["attention_mask"], asked, strict=True):
        alone = processor.prompt(document)["input_ids"][0]
        assert row[mask == 1].tolist() == alone.tolist()
        assert mask.tolist() == sorted(mask.tolist())
    assert batch["sizes"].tolist() == [[32, 32]]
    assert not {"pixels", "sizes"} & processor.prompt(asked[1]).keys()
    (view,) = batch["pixels"].view(-1, 32, 32, 3)
    np.testing.assert_array_equal(view.numpy(), processor.encode(chat(1)).pixels[0])


def test_a_damaged_image_is_named(build: Callable[..., Any]) -> None:
    from dataclasses import replace

    good, image = picture(1), picture(2)
    torn = replace(image, data=image.data[: len(image.data) // 2])
    document = Document((*Document.caption(good, "the cat").parts, torn, Text("a chair")))
    with pytest.raises(DocumentError, match="image 2"):
        make_processor().encode(document)
