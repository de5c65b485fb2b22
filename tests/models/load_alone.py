"""Loads folders in a process that cannot import us: python load_alone.py JOBS RESULT

JOBS is a JSON file and holds `folders`, each with the name of its class, and `documents`: messages
and paths of images. RESULT is a safetensors file with, for each folder and document, ids, logits,
and what is generated greedily; with `together`, also what is generated for all documents as rows of
one batch, shorter ones padded by the processor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Blocked:
    """Finds nothing of ours, installed or not."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in ("mllm", "data_packing"):
            raise ModuleNotFoundError(f"{name} is blocked in this process", name=name)
        return None


sys.meta_path.insert(0, _Blocked())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

from tests.models.own_processors import own_processor  # noqa: E402


def _inputs(processor: Any, messages: list[dict[str, Any]], images: list[str], prompt: bool) -> Any:
    pictures = [Image.open(path).convert("RGB") for path in images]
    text = processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    return processor(
        text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False
    )


def _together(processor: Any, documents: list[tuple[list[dict[str, Any]], list[str]]]) -> Any:
    pictures = [[Image.open(path).convert("RGB") for path in paths] for _, paths in documents]
    texts = [
        processor.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        for messages, _ in documents
    ]
    return processor(
        text=texts, images=pictures, return_tensors="pt", padding=True, add_special_tokens=False
    )


@torch.no_grad()
def main(jobs: str, result: str) -> None:
    try:
        __import__("mllm")
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("mllm can be imported")
    torch.set_num_threads(1)
    with open(jobs) as file:
        given = json.load(file)
    found: dict[str, torch.Tensor] = {}
    for key, (folder, name) in given["folders"].items():
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert model.config.model_type == name, model.config.model_type
        processor = own_processor(folder, name)
        for number, (messages, images) in enumerate(given["documents"]):
            inputs = _inputs(processor, messages, images, prompt=False)
            found[f"{key}.{number}.ids"] = inputs["input_ids"][0]
            found[f"{key}.{number}.logits"] = model(**inputs).logits[0]
            prompt = _inputs(processor, messages[:-1], images, prompt=True)
            wrote = model.generate(**prompt, max_new_tokens=8, do_sample=False)
            found[f"{key}.{number}.wrote"] = wrote[0, prompt["input_ids"].shape[1] :]
        if given["together"]:
            prompts = _together(processor, given["documents"])
            wrote = model.generate(**prompts, max_new_tokens=8, do_sample=False)
            found[f"{key}.together"] = wrote[:, prompts["input_ids"].shape[1] :]
    save_file({key: value.contiguous() for key, value in found.items()}, result)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
