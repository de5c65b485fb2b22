"""What plain transformers makes of an exported folder; runs where ../outside.py says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)


def messages(images: list[str], box: list[float] | None) -> list[dict[str, Any]]:
    """Two pictures and two questions, the second perhaps of a region."""
    first, second = ({"type": "image", "path": path} for path in images)
    question = {"type": "text", "text": "\nWhat is this?"}
    region = [] if box is None else [{"type": "text", "text": "", "box": box}]
    return [
        {"role": "user", "content": [first, question]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is a dog."}]},
        {"role": "user", "content": [second, {"type": "text", "text": "\nWhich room?"}, *region]},
    ]


def stepped(model: Any, chat: Any, answered: torch.Tensor) -> dict[str, Any]:
    """Logits of the last token of an answer, with a cache that is filled by hand and without."""
    length = chat["input_ids"].shape[1]
    found = model(**chat, use_cache=True)
    for token in answered[:, length:].split(1, dim=1):
        found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
    chat = {**chat, "input_ids": answered, "attention_mask": torch.ones_like(answered)}
    return {"stepped": found.logits[:, -1], "whole": model(**chat).logits[:, -1]}


@torch.no_grad()
def answer(
    folder: str,
    images: list[str],
    again: str,
    adapter: str | None,
    image: str = "<image>",
    box: list[float] | None = None,
    step: bool = False,
    **by_hand: Any,
) -> dict[str, Any]:
    """Load the folder; `image` stands for one in raw texts, `by_hand` goes to the processor."""
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    options: dict[str, Any] = {"add_generation_prompt": True}
    turns = messages(images, box)
    region = {} if box is None else {"regions": [box]}
    chat = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    text = processor.apply_chat_template(turns, **options)
    told = processor(text=text, images=images, return_tensors="pt", **by_hand, **region)
    caption = processor(text=f"{image}\na red chair", images=images[:1], return_tensors="pt")
    both = processor(
        text=["a red chair", f"{image}{image}\na small parrot{'<region>' if box else ''}"],
        images=images,
        **region,
        return_tensors="pt",
        padding=True,
    )
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    result = {
        "ids": chat["input_ids"],
        "ids by hand": told["input_ids"],
        "logits by hand": model(**told).logits,
        "caption": caption["input_ids"],
        "pixels": chat["pixel_values"],
        "logits": model(**chat).logits,
        "hidden": model.model(**chat, return_dict=False)[0],
        "greedy": model.generate(**chat, **limits),
        "beams": model.generate(**both, **limits, num_beams=2)[:, -4:],
    }
    if step:
        result |= stepped(model, chat, result["greedy"])
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
