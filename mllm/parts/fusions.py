"""The ways in which a recipe can let visual tokens reach the language model."""

from __future__ import annotations

from mllm.parts.option import FLAG, LAYERS, WHOLE, Option, Part

FUSIONS: dict[str, Part] = {
    "in_sequence": Part(
        "they take the places of image tokens (LLaVA); the default",
        "models.fusion.in_sequence:InSequence",
        "{name: in_sequence}",
    ),
    "cross_attention": Part(
        "gated cross-attention, an image is one token (Flamingo)",
        "models.fusion.cross_attention:CrossAttention",
        "{name: cross_attention, every: 4}",
        {
            "every": Option(WHOLE, "before layers 0, n, 2n and so on", default=4, most=1024),
            "layers": Option(LAYERS, "or before these, from 0", otherwise="by every"),
            "heads": Option(WHOLE, "of the attention", otherwise="the LLM's", most=65536),
            "head_width": Option(WHOLE, "of one head", otherwise="the LLM's", most=65536),
            "inner": Option(WHOLE, "width of the MLP", otherwise="4 x LLM's", most=262144),
            "only_immediate": Option(FLAG, "see the last image only, not all", default=True),
        },
        ("Flamingo",),
    ),
    "deepstack": Part(
        "in the sequence, and levels added after early layers",
        "models.fusion.deepstack:DeepStack",
        "{name: deepstack, layers: [0, 1, 2]}",
        {"layers": Option(LAYERS, "after which a level is added", otherwise="first 3")},
    ),
}
"""Name → what it is; the order of `mllm models`."""

DEFAULT = "in_sequence"

WITH_WEIGHTS = ("cross_attention",)
"""Fusions that have something to learn; their gates start closed."""
