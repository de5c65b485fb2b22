"""What an exported folder does in a process that has no `mllm`, beside what the model does here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage

from data_packing.document import Document, Image
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests import outside

SIZES = ((40, 56), (90, 30))


def save_pictures(root: Path) -> list[str]:
    """Two PNGs, the second with transparency."""
    paths = []
    for seed, (height, width) in enumerate(SIZES):
        channels = 3 + seed
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, channels), dtype=np.uint8)
        paths.append(str(root / f"{seed}.png"))
        PillowImage.fromarray(pixels).resize((width, height)).save(paths[-1])
    return paths


def ask(
    root: Path, requests: Mapping[str, Mapping[str, Any]], script: str = "outside.py"
) -> dict[str, dict[str, Any]]:
    """Load every folder in one process without this project."""
    return outside.ask(Path(__file__).with_name(script), requests, root)


def conversation(pictures: list[str]) -> Document:
    """The conversation of outside.py."""
    first, second = (Image.open(Path(path)) for path in pictures)
    return Document.conversation(
        [
            ("user", [first, "\nWhat is this?"]),
            ("assistant", "It is a dog."),
            ("user", [second, "\nWhich room?"]),
        ]
    )


@torch.no_grad()
def here(model: MultimodalModel, processor: Processor, pictures: list[str]) -> dict[str, Any]:
    """What this package makes of the same conversation and caption."""
    images = [Image.open(Path(path)) for path in pictures]
    inputs = processor.prompt(conversation(pictures))
    two = Document(
        (
            *Document.caption(images[0], "a").parts[:1],
            *Document.caption(images[1], "a small parrot").parts,
        )
    )
    both = processor.prompts([Document(Document.caption(images[0], "a red chair").parts[1:]), two])
    limits: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return {
        "ids": inputs["input_ids"],
        "caption": processor.prompt(Document.caption(images[0], "a red chair"))["input_ids"],
        "pixels": inputs["pixels"],
        "logits": model(**inputs).logits,
        "hidden": model.hidden_states(**inputs),
        "greedy": model.generate(**inputs, **limits),
        "beams": model.generate(**both, **limits, num_beams=2)[:, -4:],
    }
