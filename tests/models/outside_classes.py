"""What transformers' own classes make of folders; runs where ../outside.py says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

OWN = Path(__file__).with_name("own_processors.py")


def _by_hand(
    processor: Any, messages: list[dict[str, Any]], images: list[str], prompt: bool
) -> Any:
    """Write the text first, then hand it over with the images."""
    pictures = [Image.open(path).convert("RGB") for path in images]
    text = processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    return processor(
        text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False
    )


def _inputs(processor: Any, asked: dict[str, Any]) -> tuple[Any, Any]:
    """What is computed, and what is gone on from."""
    if "text" in asked:
        image = Image.open(asked["image"])
        inputs = processor(images=image, text=asked["text"], return_tensors="pt")
        return inputs, inputs
    messages = asked["messages"]
    if "images" in asked:
        images = asked["images"]
        return (
            _by_hand(processor, messages, images, prompt=False),
            _by_hand(processor, messages[:-1], images, prompt=True),
        )
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return inputs, inputs


def _batch(processor: Any, documents: list[dict[str, Any]]) -> Any:
    """All of them as one batch; the processor pads the shorter ones."""
    texts = [
        processor.apply_chat_template(
            asked["messages"][:-1], add_generation_prompt=True, tokenize=False
        )
        for asked in documents
    ]
    pictures = [
        [Image.open(path).convert("RGB") for path in asked["images"]] for asked in documents
    ]
    return processor(
        text=texts, images=pictures, return_tensors="pt", padding=True, add_special_tokens=False
    )


@torch.no_grad()
def answer(
    folder: str,
    kind: str,
    documents: list[dict[str, Any]],
    together: bool = False,
    adapter: bool = False,
) -> dict[str, Any]:
    """Load a folder and return ids [T], logits [T, W] and eight new ids of every document.

    Args:
        kind: its `model_type`.
        documents: {messages, images}, a whole conversation and the files of its images: computed
            whole, and its last turn written anew; {messages} with files in them, to be gone on
            with; or {image, text}.
        together: also return the new ids [B, 8] of all documents as one batch.
        adapter: put PEFT's on the model that lies in the folder.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert model.config.model_type == kind, model.config.model_type
    name = type(model).__name__
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, f"{folder}/adapter").eval()
    processor = runpy.run_path(str(OWN))["own_processor"](folder, kind)
    found = []
    for asked in documents:
        whole, prompt = _inputs(processor, asked)
        new = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        found.append(
            {
                "ids": whole["input_ids"][0],
                "logits": model(**whole).logits[0],
                "new": new[0, prompt["input_ids"].shape[1] :],
            }
        )
    result = {"class": name, "documents": found}
    if together:
        prompts = _batch(processor, documents)
        new = model.generate(**prompts, max_new_tokens=8, do_sample=False)
        result["together"] = new[:, prompts["input_ids"].shape[1] :]
    return result
