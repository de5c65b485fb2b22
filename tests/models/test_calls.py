"""A processor is called as the collate functions and loops of transformers' users call it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from transformers import TextStreamer

from mllm.models.geometry import ImageGeometry
from mllm.models.native import NativeGeometry
from mllm.models.processor import Processor
from tests.models.begin_tokenizers import BEGIN, TEMPLATES, begin_tokenizer
from tests.models.conftest import CHATML, Parts, make_tokenizer

QUESTIONS = ("What is this?", "Which room does it belong to?")


@pytest.fixture
def parts(build: Any) -> Parts:
    made: Parts = build("clip", "average_pool")
    return made


def photos() -> list[PillowImage.Image]:
    random = np.random.default_rng(0)
    return [
        PillowImage.fromarray(random.integers(0, 256, (30, width, 3), dtype=np.uint8))
        for width in (20, 50)
    ]


def conversations() -> list[list[dict[str, Any]]]:
    return [
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": "It is a dog."}]},
        ]
        for question in QUESTIONS
    ]


def test_a_collate_function(parts: Parts) -> None:
    model, processor = parts
    texts = [processor.apply_chat_template(one, tokenize=False) for one in conversations()]
    images = [[photo] for photo in photos()]
    logits = {}
    for side in ("left", "right"):
        batch = processor(
            text=texts, images=images, return_tensors="pt", padding=True, padding_side=side
        )
        seen = batch["attention_mask"].bool()
        assert bool(seen[0, 0]) is (side == "right")
        labels = batch["input_ids"].clone()
        labels[~seen] = -100
        labels[labels == processor.image_token_id] = -100
        result = model(**batch, labels=labels)
        result.loss.backward()
        assert result.loss.isfinite()
        logits[side] = result.logits[seen].detach()
    torch.testing.assert_close(logits["left"], logits["right"])


def test_generating_a_batch(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = parts
    how: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    texts = processor.apply_chat_template(
        [one[:1] for one in conversations()], add_generation_prompt=True
    )
    together = processor(text=texts, images=photos(), padding=True)
    rows = model.generate(**together, **how)[:, together["input_ids"].shape[1] :]
    said = processor.post_process_image_text_to_text(rows, skip_special_tokens=True)
    assert said == processor.batch_decode(rows, skip_special_tokens=True)
    for text, photo, row in zip(texts, photos(), rows, strict=True):
        alone = processor(text=text, images=photo)
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
        assert torch.equal(model.generate(**alone, **how, streamer=streamer)[0, -4:], row)
        assert capsys.readouterr().out.strip() == processor.decode(row).strip()


def test_lengths_are_as_asked(parts: Parts) -> None:
    processor = parts[1]
    texts = ["a red chair", "a small green parrot sat on a red chair"]
    short, long = (len(processor(text=text)["input_ids"][0]) for text in texts)

    def shape(**how: Any) -> list[int]:
        return list(processor(text=texts, **how)["input_ids"].shape)

    assert shape() == shape(padding="longest") == shape(text_kwargs={"padding": True}) == [2, long]
    assert shape(padding="max_length", max_length=60) == [2, 60]
    assert shape(pad_to_multiple_of=64) == [2, 64]
    assert shape(truncation=True, max_length=short) == [2, short]
    cut = processor(text=texts[1], truncation=True, max_length=short)["input_ids"][0]
    assert torch.equal(cut, processor(text=texts[1])["input_ids"][0, :short])
    processor.tokenizer.model_max_length = short
    assert shape(truncation="longest_first") == [2, short]
    assert "attention_mask" not in processor(text="a", return_attention_mask=False)
    processor.tokenizer.padding_side = "right"
    assert processor(text=texts)["attention_mask"][0, 0] == 1
    turns = [{"role": "user", "content": "a"}]
    ids = processor.apply_chat_template(turns, tokenize=True, padding="max_length", max_length=99)
    assert len(ids) == 99


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"padding": False}, "rows of different lengths"),
        ({"padding": "maybe"}, "padding='maybe' is none of True"),
        ({"padding": "max_length"}, "needs max_length: the tokenizer has none"),
        ({"padding_side": "top"}, "neither 'left' nor 'right'"),
        ({"max_length": 9}, "says nothing without truncation=True"),
        ({"max_length": 0, "truncation": True}, "max_length=0 is no number"),
        ({"max_length": 3, "truncation": True}, "would cut an image"),
        ({"return_tensors": "np"}, "tensors of torch"),
        ({"return_offsets_mapping": True}, "no argument 'return_offsets_mapping'"),
        ({"do_resize": False}, "no argument 'do_resize'"),
        ({"images_kwargs": {"size": 3}}, "no argument 'size'"),
        ({"videos": [1]}, "no videos"),
        ({"text": [["a", "b"]]}, "a string or a list of strings"),
        ({"text": [{"role": "user", "content": "a"}]}, "goes through apply_chat_template"),
    ],
)
def test_what_cannot_be_done_is_refused(parts: Parts, how: dict[str, Any], reason: str) -> None:
    given = {"text": ["<image> a", "<image> a red chair"], "images": photos(), **how}
    with pytest.raises(ValueError, match=reason) as refused:
        parts[1](**given)
    assert "\n" not in str(refused.value)


def test_arguments_of_a_chat_template(parts: Parts) -> None:
    processor = parts[1]
    turns = conversations()[0]
    processor.chat_template = CHATML.replace("a small helper", "' + helper + '")
    assert "a cat<" in processor.apply_chat_template(turns, helper="a cat")
    with pytest.raises(ValueError, match="neither the chat template nor the processor takes 'cat'"):
        processor.apply_chat_template(turns, cat="a cat")
    with pytest.raises(ValueError, match="'return_assistant_tokens_mask'"):
        processor.apply_chat_template(turns, tokenize=True, return_assistant_tokens_mask=True)
    own = "{% for message in messages %}{{ message['content'] }};{% endfor %}"
    text = processor.apply_chat_template(turns, chat_template=own)
    assert text == f"<image>{QUESTIONS[0]};It is a dog.;"
    whole = processor.apply_chat_template(turns, helper="")
    left_open = processor.apply_chat_template(turns, helper="", continue_final_message=True)
    assert whole.startswith(left_open)
    assert left_open.endswith("It is a dog.")


def test_openai_messages(parts: Parts) -> None:
    processor = parts[1]
    shown = {"type": "image", "image": photos()[0]}
    address = {"type": "image_url", "image_url": {"url": data_url(photos()[0])}}
    both = [
        processor.apply_chat_template(
            [{"role": "user", "content": [image, {"type": "text", "text": "a"}], "name": None}],
            tokenize=True,
            return_dict=True,
        )
        for image in (shown, address)
    ]
    for name, value in both[0].items():
        assert torch.equal(value, both[1][name]), name


def data_url(image: PillowImage.Image) -> str:
    import base64
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


SQUARE = ImageGeometry(32, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds", [True, False])
def test_the_begin_token_is_where_it_belongs(adds: bool, template: str) -> None:
    tokenizer = begin_tokenizer(adds, TEMPLATES[template])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = Processor(tokenizer, SQUARE, {"name": "average_pool", "visual_tokens": 4})
    begin = tokenizer.convert_tokens_to_ids(BEGIN)
    turns: Any = [{"role": "user", "content": "What is this?"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    ids = processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)
    assert processor(text=text)["input_ids"][0].tolist() == ids
    assert ids.count(begin) == ("writes" in template)
    raw = processor(text="a red chair")["input_ids"][0].tolist()
    assert raw.count(begin) == adds
    assert processor(text=f"{BEGIN}a red chair")["input_ids"][0].tolist().count(begin) == 1
    for wanted in (True, False):
        for one in (text, "a red chair"):
            made = processor(text=one, add_special_tokens=wanted)["input_ids"][0].tolist()
            written = "writes" in template and one is text
            assert made.count(begin) == (written or (wanted and adds))


def test_bounds_of_native_resolution_are_given_on_loading(tmp_path: Any) -> None:
    geometry = NativeGeometry(8, 1, (0.5,) * 3, (0.5,) * 3, min_pixels=64, max_pixels=4096)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = Processor(tokenizer, geometry, {"name": "mlp"})
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    smaller = Processor.from_pretrained(tmp_path, max_pixels=1024)
    assert processor.image_cost(640, 640)[0] == 64
    assert smaller.image_cost(640, 640)[0] == 16
