"""Runs in a process of its own that cannot import this project: loads exported folders.

python outside.py REQUESTS.json: each names a folder and images; beside it, results are saved.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

HIDDEN = {"mllm", "data_packing", "tests"}


class Hide:
    """Finds the project's packages first, and refuses them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
        return None


sys.meta_path.insert(0, Hide())

import torch  # noqa: E402
from transformers import (  # noqa: E402
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


def fused(folder: str, images: list[str], image_token_id: int) -> dict[str, Any]:
    """What can go wrong where visual tokens reach the layers of a language model."""
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    requests = json.loads(Path(sys.argv[1]).read_text())
    for name, request in requests.items():
        try:
            found = {"answer": answer, "fused": fused}[request.pop("what", "answer")](**request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, Path(sys.argv[1]).parent / f"{name}.pt")
