"""What plain transformers makes of an exported folder; runs where ../outside.py says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)


def messages(images: list[str]) -> list[dict[str, Any]]:
    """Two pictures and two questions."""
    first, second = ({"type": "image", "path": path} for path in images)
    question = {"type": "text", "text": "\nWhat is this?"}
    return [
        {"role": "user", "content": [first, question]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is a dog."}]},
        {"role": "user", "content": [second, {"type": "text", "text": "\nWhich room?"}]},
    ]


@torch.no_grad()
def answer(folder: str, images: list[str], again: str, adapter: str | None) -> dict[str, Any]:
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    options: dict[str, Any] = {"add_generation_prompt": True}
    turns = messages(images)
    chat = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    text = processor.apply_chat_template(turns, **options)
    by_hand = processor(text=text, images=images, return_tensors="pt")
    caption = processor(text="<image>a red chair", images=images[:1], return_tensors="pt")
    both = processor(
        text=["a red chair", "<image><image>a small parrot"],
        images=images,
        return_tensors="pt",
        padding=True,
    )
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    result = {
        "ids": chat["input_ids"],
        "ids by hand": by_hand["input_ids"],
        "caption": caption["input_ids"],
        "pixels": chat["pixel_values"],
        "logits": model(**chat).logits,
        "hidden": model.model(**chat, return_dict=False)[0],
        "greedy": model.generate(**chat, **limits),
        "beams": model.generate(**both, **limits, num_beams=2)[:, -4:],
    }
    if adapter is not None:
        from peft import PeftModel

        result["adapted"] = PeftModel.from_pretrained(model, adapter)(**chat).logits
    if again:
        model.save_pretrained(again)
        processor.save_pretrained(again)
        model = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(again, trust_remote_code=True)
        chat = processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        result["logits again"] = model(**chat).logits
    return result
