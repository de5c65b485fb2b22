"""The real weights of the quick start, when they are on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_packing.document import Document, Text
from data_packing.pack import collate
from mllm.models.assemble import assemble
from tests.models.conftest import chat, documents

MODELS = Path("data/quickstart/models")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS.is_dir(), reason="run scripts/quickstart.sh first"),
]


def section() -> dict[str, dict[str, object]]:
    return {
        "encoder": {"name": "efficientnet_lite", "path": MODELS / "efficientnet-lite0"},
        "connector": {"name": "average_pool", "visual_tokens": 16},
        "language_model": {"path": MODELS / "SmolLM2-135M-Instruct"},
    }


def test_packed_is_unpacked_on_smollm2() -> None:
    model, processor = assemble(section())
    samples = [processor.encode(document) for document in documents()]
    pack = collate(samples, 0)
    with torch.no_grad():
        together = model.hidden_states(
            pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
        )[0]
        for number, sample in enumerate(samples):
            one = collate([sample], 0)
            alone = model.hidden_states(one.input_ids, one.pixels, one.sizes)[0]
            start, stop = pack.cu_seqlens[number : number + 2].tolist()
            scale = float(alone.abs().max())
            torch.testing.assert_close(
                together[start:stop] / scale, alone / scale, atol=1e-5, rtol=0
            )


def test_the_language_model_still_answers() -> None:
    model, processor = assemble(section(), dtype=torch.bfloat16)
    asked = Document((Text("What is the capital of France?", "user"),))
    inputs = processor.prompt(asked)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


def test_its_default_system_prompt_is_kept() -> None:
    _, processor = assemble(section(), dtype=torch.bfloat16)
    text = processor.decode(processor.encode(chat(1)).input_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
