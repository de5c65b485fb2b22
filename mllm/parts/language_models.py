"""Which language models were tried and which are refused; any other is tried when it is assembled.

docs/language_models.md has the same tables; a test compares them, and the families that are run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """Language models that have something in common.

    Attributes:
        families: as their authors write them.
        why: what they need beside causal attention inside a document, or why they are refused.
        what: of refused ones, what they have that a pack cannot bear.
    """

    families: tuple[str, ...]
    why: str
    what: str = ""


TESTED = (
    Kind(("Llama", "Qwen2", "Qwen3", "Phi", "Olmo2", "GPT-NeoX"), "nothing"),
    Kind(("SmolLM3",), "nothing, its layers without positions included"),
    Kind(
        ("Mistral", "Mixtral", "Qwen2 with windows", "Phi3", "Starcoder2", "Olmo3"),
        "sliding windows",
    ),
    Kind(
        ("Gemma", "Gemma3 (text)"),
        "an embedding that scales words; visual tokens enter as they are, as in PaliGemma",
    ),
    Kind(("Gemma2",), "as Gemma, and a soft cap on attention and one on the logits"),
    Kind(
        ("Qwen2-VL (text)", "Qwen2.5-VL (text)", "Qwen3-VL (text)", "Qwen3-VL-MoE (text)"),
        "positions in three directions: time, row and column",
    ),
    Kind(("gpt-oss",), "windows and attention sinks"),
    Kind(
        ("Granite", "GraniteMoe", "Cohere"),
        "scaled logits; Granite's body scales words and visual tokens alike",
    ),
    Kind(("GPT-2",), "learned positions that restart with every document"),
    Kind(("OPT",), "as GPT-2; its embedding may be narrower than its layers"),
    Kind(("DeepSeek-V3", "MiniCPM3"), "values that are narrower than keys"),
    Kind(
        ("Qwen2-MoE", "Qwen3-MoE", "Mixtral", "GraniteMoe"),
        "experts; the router's auxiliary losses are not added",
    ),
)

REFUSED = (
    Kind(
        (
            *("Mamba", "Mamba2", "Falcon-Mamba", "Jamba", "Bamba", "Falcon-H1", "Zamba2"),
            *("RecurrentGemma", "MiniMax", "Granite 4 hybrid", "Qwen3-Next", "Qwen3.5"),
        ),
        "it goes on from one document into the next, and transformers' implementations in torch do "
        "not stop it at document bounds (Qwen3-Next's takes them and ignores them)",
        "a state over the tokens before",
    ),
    Kind(("LFM2",), "they reach over a bound", "convolutions"),
    Kind(
        ("Llama 4", "DeepSeek-V3.2", "DeepSeek-V4"),
        "chunks and choices do not follow documents",
        "chunked or indexed attention",
    ),
    Kind(("Doge", "BERT"), "a pack has no mask", "a mask of its own"),
    Kind(
        ("BLOOM", "MPT", "Falcon", "GPT-J", "RWKV", "xLSTM", "StableLM"),
        "it cannot be told the bounds",
        "attention that is not the interface's",
    ),
    Kind(("Nemotron",), "the bounds do not arrive", "dropped keyword arguments"),
    Kind(("Gemma 3n",), "an image has none", "token ids in every layer"),
)
