from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_packing.document import Document, DocumentError, Image
from mllm.inference import chat as chats
from mllm.inference.generate import Generator, load
from tests.evaluation.conftest import square
from tests.evaluation.tiny import make_model, save_stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    model, processor = make_model(root / "parts")
    return save_stage(root / "out" / "1_align", model, processor, root / "parts" / "llama")


@pytest.fixture(scope="module")
def generator(stage: Path) -> Generator:
    return Generator.from_pretrained(stage, "cpu")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red square.png"
    path.write_bytes(square("red").data)
    return path


def question() -> Document:
    return Document.conversation([("user", [square("red"), "What is this?"])])


def test_the_stream_is_what_generate_gives(generator: Generator) -> None:
    model, processor = generator.model, generator.processor
    inputs = processor.prompt(question())
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(generator.stream(question(), max_new_tokens=12)) == expected
    assert expected.strip() == generator.answer(question(), max_new_tokens=12)


def test_the_prompt_is_how_training_begins(generator: Generator) -> None:
    """Promise 8: the ids before an answer are the same in training and in chat."""
    processor = generator.processor
    document = chats.Conversation(images=[square("red")])
    document.remember("What is this?", "a red chair")
    prompt = processor.prompt(document.ask("Which room?"))["input_ids"][0].tolist()
    trained = processor.encode(
        Document.conversation(
            [
                ("user", [square("red"), "What is this?"]),
                ("assistant", "a red chair"),
                ("user", "Which room?"),
                ("assistant", "a room"),
            ]
        )
    )
    assert trained.input_ids[: len(prompt)].tolist() == prompt
    assert (trained.labels[len(prompt) :] != -100).sum() > 0


def test_answers_together_equal_answers_alone(generator: Generator) -> None:
    documents = [
        question(),
        Document.conversation([("user", [square("blue"), "Which room does it belong to?"])]),
        Document.conversation([("user", "Which room?")]),
    ]
    together = generator.answers(documents, max_new_tokens=8)
    assert together == [generator.answer(document, max_new_tokens=8) for document in documents]


def test_temperature_draws(generator: Generator) -> None:
    torch.manual_seed(0)
    drawn = {generator.answer(question(), 6, temperature=5.0) for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize(("length", "temperature"), [(0, 0.0), (5, -1.0)])
def test_senseless_options_are_refused(
    generator: Generator, length: int, temperature: float
) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        generator.stream(question(), length, temperature)


def test_a_failure_inside_reaches_the_reader(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(generator.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        list(generator.stream(question()))


def test_a_reader_who_leaves_ends_the_generation(generator: Generator) -> None:
    stream = generator.stream(question(), max_new_tokens=400)
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # joins the thread; hangs here if it goes on


def test_single_shot(stage: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats.chat(stage, [picture], "What is this?", max_new_tokens=6)
    first = capsys.readouterr().out
    answer = Generator.from_pretrained(stage, "cpu").answer(
        chats.Conversation(images=[Image.open(picture)]).ask("What is this?"), 6
    )
    assert first.strip() == answer
    assert first.strip()


def reader(*lines: str) -> Callable[[], str | None]:
    waiting = iter(lines)
    return lambda: next(waiting, None)


def test_a_conversation_goes_on_after_mistakes(
    picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Document] = []

    def answer(document: Document) -> str:
        asked.append(document)
        return "a chair"

    lines = reader(
        "/image none.png",
        f"/image '{picture}'",
        "What is it?",
        "",
        "Which room?",
        "/what",
        "/new",
        "Hello",
        "/quit",
        "never read",
    )
    chats.talk(answer, chats.Conversation(), lines)
    output = capsys.readouterr().out
    assert "none.png" in output
    assert "12 × 12 pixels" in output
    assert "/image PATH" in output
    assert [len(document.parts) for document in asked] == [2, 4, 1]
    assert [len(document.images) for document in asked] == [1, 1, 0]
    assert [part.role for part in asked[1].parts] == ["user", "user", "assistant", "user"]


def test_an_unknown_command_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    chats.talk(lambda document: "", chats.Conversation(), reader("/help", "/foo bar"))
    known, unknown = capsys.readouterr().out.split("/quit", 1)
    assert known.startswith("/image PATH")
    assert "unknown command /foo; there are\n/image PATH" in unknown


def test_what_the_template_refuses_is_said_and_forgotten(
    generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    talked = chats.Conversation()
    chats.talk(lambda d: generator.answer(d, 3), talked, reader("<|im_end|>", "Which room?"))
    assert "special token" in capsys.readouterr().out
    assert next(part.text for part in talked.ask("x").parts) == "Which room?"  # type: ignore[union-attr]


def test_folders_that_hold_no_model(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder|there is no"):
        load(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        load(empty)
    (empty / "run.json").write_text(json.dumps({"steps": 5}))
    with pytest.raises(ValueError, match="not finished"):
        load(empty)
    with pytest.raises(ValueError, match="1_align"):
        load(stage.parent)


def test_a_stage_killed_before_its_marker_is_not_taken_for_whole(
    stage: Path, tmp_path: Path
) -> None:
    torn = shutil.copytree(stage, tmp_path / "torn")
    (torn / "FINISHED").unlink()
    with pytest.raises(ValueError, match="not finished"):
        load(torn)


def test_any_end_that_the_model_knows_ends_an_answer(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn's end need not be the tokenizer's end of a text."""
    tokenizer, config = generator.processor.tokenizer, generator.model.generation_config
    inputs = generator.processor.prompt(question())
    with torch.inference_mode():
        ids = generator.model.generate(**inputs, do_sample=False, max_new_tokens=12)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    first = new[0]
    assert len(new) > 1
    assert first != tokenizer.eos_token_id
    monkeypatch.setattr(config, "eos_token_id", [tokenizer.eos_token_id, first])
    expected = tokenizer.decode([first], skip_special_tokens=True).strip()
    assert generator.answer(question(), 12) == expected
    assert generator.answers([question()], 12) == [expected]


def test_a_language_model_alone_is_named(stage: Path) -> None:
    with pytest.raises(ValueError, match="llama"):
        load(stage.parents[1] / "parts" / "llama")


def test_nothing_to_answer(stage: Path, tmp_path: Path) -> None:
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="--question is empty; ask something"):
            chats.chat(stage, question=empty)
    generator = Generator.from_pretrained(stage)
    generator.processor.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(DocumentError, match="nothing to go on from: the prompt has no tokens"):
        generator.answer(Document.conversation([("user", "")]))


def test_an_image_that_cannot_be_read(stage: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for path in (broken, tmp_path / "none.png"):
        with pytest.raises(ValueError, match=path.name):
            chats.chat(stage, [path], "What?")
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(ValueError, match=r"clip\.mp4 is a clip, and chat takes images: save some"):
        chats.chat(stage, [clip], "What?")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_devices_that_are_not_there(stage: Path) -> None:
    with pytest.raises(ValueError, match="no GPU"):
        load(stage, "cuda")
    with pytest.raises(ValueError, match="unknown device"):
        load(stage, "abacus")
