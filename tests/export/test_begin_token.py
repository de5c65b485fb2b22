"""An exported processor puts the begin token and padding where this package's own does."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image as PillowImage
from transformers import AutoTokenizer

from data_packing.document import Document
from mllm.export import standalone_processor
from mllm.export.source_sections import with_sections
from mllm.export.transformers import make_processor
from mllm.models.composites.text import written_tokenizer
from mllm.models.geometry import ImageGeometry
from mllm.models.processor import Processor
from mllm.models.template import ImageText
from tests.models.begin_tokenizers import BEGIN, TEMPLATES, begin_tokenizer
from tests.models.conftest import picture

SQUARE = ImageGeometry(32, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MARKED = "<open><image><close>"
IMAGE_TEXTS = {
    "alone": None,
    "marked by the template": ImageText(MARKED, MARKED),
    "marked when tokenised": ImageText("<image>", MARKED),
}


def plain_module() -> ModuleType:
    """The exported processor's module without what only some models need."""
    text = Path(standalone_processor.__file__).read_text(encoding="utf-8")
    module = ModuleType("plain")
    exec(with_sections(text, frozenset()), vars(module))
    return module


def both(adds: bool, template: str, image_text: ImageText | None) -> tuple[Processor, Any]:
    """Ours, and the one that is exported of it."""
    tokenizer = begin_tokenizer(adds, template)
    tokenizer.add_tokens(["<image>", "<open>", "<close>"], special_tokens=True)
    connector = {"name": "average_pool", "visual_tokens": 4}
    ours = Processor(tokenizer, SQUARE, connector, image_text=image_text)
    exported: Any = make_processor(plain_module(), ours)
    return ours, exported


def ids(processor: Any, text: Any, image: Any, **how: Any) -> list[list[int]]:
    rows: list[list[int]] = processor(text=text, images=image, return_tensors="pt", **how)[
        "input_ids"
    ].tolist()
    return rows


@pytest.mark.parametrize("image_text", IMAGE_TEXTS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds", [True, False])
def test_both_make_the_same_ids(adds: bool, template: str, image_text: str) -> None:
    ours, exported = both(adds, TEMPLATES[template], IMAGE_TEXTS[image_text])
    shown = ours.template.image_text.asked
    image = PillowImage.open(io.BytesIO(picture(1).data))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    turns: Any = [{"role": "user", "content": content}]
    texts = [one.apply_chat_template(turns, add_generation_prompt=True) for one in (ours, exported)]
    assert texts[0] == texts[1]
    chats = [
        one.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"].tolist()
        for one in (ours, exported)
    ]
    assert chats[0] == chats[1] == ids(ours, texts[0], image) == ids(exported, texts[0], image)
    raw = f"{shown}a red chair"
    document = Document.caption(picture(1), "a red chair")
    written = ours.prompt(document)["input_ids"].tolist()
    assert ids(ours, raw, image) == ids(exported, raw, image) == written
    begin = ours.tokenizer.convert_tokens_to_ids(BEGIN)
    assert written[0].count(begin) == adds
    for chosen in (True, False):
        for text in (texts[0], raw, BEGIN + raw):
            how = {"add_special_tokens": chosen}
            wanted = ids(ours, text, image, **how)
            assert ids(exported, text, image, **how) == wanted
            assert ids(exported, text, image, text_kwargs=how) == wanted


def test_texts_of_both_kinds_are_not_mixed() -> None:
    _, exported = both(True, TEMPLATES["template does not"], None)
    texts = ["a", "<|im_start|>user a"]
    with pytest.raises(ValueError, match="process those of the chat template and raw ones apart"):
        exported(text=texts, padding=True)
    exported(text=texts, padding=True, add_special_tokens=True)


@pytest.mark.parametrize("pad", [None, BEGIN])
@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_of_an_export_begin_with_padding(
    template: str, pad: str | None, tmp_path: Path
) -> None:
    """Whatever side the tokenizer had, with the end token if it had no other; also after saving."""
    ours, _ = both(True, TEMPLATES[template], None)
    tokenizer: Any = ours.tokenizer
    tokenizer.padding_side = "right"
    tokenizer.init_kwargs.pop("padding_side", None)  # what is not there is not saved
    tokenizer.pad_token = pad
    exported: Any = make_processor(plain_module(), ours)
    for made in (exported.tokenizer, written_tokenizer(tokenizer)):
        made.save_pretrained(tmp_path)
        for one in (made, AutoTokenizer.from_pretrained(tmp_path)):
            assert (one.padding_side, one.pad_token) == ("left", pad or tokenizer.eos_token)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", pad)
