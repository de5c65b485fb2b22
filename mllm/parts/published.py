"""The published models that `model.from` can begin from, and that are written as themselves again.

docs/warm_starts.md has the same table; a test compares names with what is read and written.
"""

from __future__ import annotations

from mllm.parts.option import Part


def _whole(summary: str, folder: str, *also: str) -> Part:
    return Part(summary, "", f"weights/{folder}", also=also)


PUBLISHED: dict[str, Part] = {
    "blip2": _whole("BLIP-2: blip2, q_former", "blip2-opt-2.7b", "BLIP-2"),
    "gemma3": _whole("Gemma 3 with images: siglip, gemma3", "gemma-3-4b-it", "Gemma 3"),
    "idefics3": _whole("Idefics3: idefics3, pixel_shuffle, tiles split", "Idefics3-8B-Llama3"),
    "internvl": _whole(
        "InternVL in transformers' class: internvl, pixel_shuffle",
        "InternVL3-1B-hf",
        *("InternVL2.5", "InternVL3"),
    ),
    "llava": _whole("LLaVA-1.5: clip or siglip, mlp", "llava-1.5-7b-hf", "LLaVA-1.5"),
    "llava_next": _whole(
        "LLaVA-NeXT: clip or siglip, mlp, tiles any_resolution",
        "llava-v1.6-mistral-7b-hf",
        "LLaVA-1.6",
    ),
    "llava_onevision": _whole(
        "LLaVA-OneVision: clip or siglip, mlp, tiles any_resolution",
        "llava-onevision-qwen2-0.5b-ov-hf",
    ),
    "qwen2_vl": _whole("Qwen2-VL: qwen2_vl, patch_merger", "Qwen2-VL-2B-Instruct"),
    "qwen2_5_vl": _whole("Qwen2.5-VL: qwen2_5_vl, patch_merger", "Qwen2.5-VL-3B-Instruct"),
    "qwen3_vl": _whole("Qwen3-VL: qwen3_vl, patch_merger, deepstack", "Qwen3-VL-4B-Instruct"),
    "qwen3_vl_moe": _whole(
        "Qwen3-VL with experts: qwen3_vl, patch_merger, deepstack", "Qwen3-VL-30B-A3B-Instruct"
    ),
    "smolvlm": _whole(
        "SmolVLM, SmolVLM2: idefics3, pixel_shuffle, tiles split", "SmolVLM-Instruct", "SmolVLM2"
    ),
}
"""Name, as of `mllm export --to` → what it is made of."""
