"""What can go wrong where visual tokens reach the layers; runs where outside.py says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def answer(folder: str, images: list[str], image_token_id: int) -> dict[str, Any]:
    """Caches, padding, training, half precision and other devices, of three rows."""
    load = partial(AutoModelForImageTextToText.from_pretrained, folder, trust_remote_code=True)
    model, processor = load().eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    texts = ["a red chair", "<image>the cat <image><image>sat on", "the <image>picture of a dog"]
    shown = [images[0], images[1], images[0], images[1]]
    both = processor(text=texts, images=shown, return_tensors="pt", padding=True)
    text = processor(text=texts[0], return_tensors="pt")
    limits = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    result: dict[str, Any] = {"ids": both["input_ids"]}
    with torch.no_grad():
        result["logits"] = model(**both).logits
        result["no image"] = model(**text).logits
        embeds = model.get_input_embeddings()(text["input_ids"])
        result["embedded"] = model(inputs_embeds=embeds).logits
        result["greedy"] = model.generate(**both, **limits)
        result["greedy without cache"] = model.generate(**both, **limits, use_cache=False)
        result["several"] = model.generate(
            **both, **{**limits, "num_beams": 4}, num_return_sequences=2
        )
        later = torch.cat([text["input_ids"]] * 3)
        steps = model(**both, use_cache=True)
        mask = torch.cat([both["attention_mask"], torch.ones_like(later)], dim=1)
        result["after"] = model(
            input_ids=later, attention_mask=mask, past_key_values=steps.past_key_values
        ).logits
        whole = {**both, "input_ids": torch.cat([both["input_ids"], later], dim=1)}
        result["whole"] = model(**{**whole, "attention_mask": mask}).logits[:, -later.shape[1] :]
        half = load(dtype=torch.bfloat16).eval()
        result["half"] = half(**both).logits
        half.generate(**both, **limits)
        parts = ("model.vision_tower", "model.connector", "model.language_model", "lm_head")
        split = load(
            device_map={**dict.fromkeys(parts, "cpu"), "model.fusion": "disk"},
            offload_folder=f"{folder} offloaded",
        )
        result["whole modules"] = sorted(split._no_split_modules)
        result["offloaded"] = split(**both).logits
    result["gradients"] = gradients(model, both)
    model.gradient_checkpointing_enable()
    result["gradients again"] = refused(gradients, model, both)
    missing = {**both, "input_ids": both["input_ids"].clone()}
    missing["input_ids"][1][missing["input_ids"][1] == image_token_id] = 5
    result["cut"] = refused(model.eval(), **missing)
    return result


def gradients(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }


def refused(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what a call returns, or the text of its refusal."""
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        return str(error)
