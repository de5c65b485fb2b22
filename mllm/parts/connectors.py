"""The connectors that a recipe can name."""

from __future__ import annotations

from mllm.parts.option import FLAG, FOLDER, POSITIVE, SQUARE, WHOLE, Option, Part, one_of

_WIDEST, _DEEPEST, _MOST = 65536, 256, 16384
_HIDDEN = Option(WHOLE, "width between the two layers", otherwise="the LLM's", most=_WIDEST)
_NORM = Option(FLAG, "a LayerNorm first; LLaVA has none", default=True)
_BIAS = Option(FLAG, "of the two layers", default=True)

CONNECTORS: dict[str, Part] = {
    "average_pool": Part(
        "cells averaged to a square grid, then an MLP",
        "models.connectors.average_pool:AveragePool",
        "{name: average_pool, visual_tokens: 144}",
        {
            "visual_tokens": Option(
                SQUARE, "tokens of a view; may change later", reloadable=True, most=_MOST
            ),
            "hidden": _HIDDEN,
            "norm": _NORM,
            "bias": _BIAS,
        },
    ),
    "c_abstractor": Part(
        "convolutions around an averaging, then an MLP (Honeybee)",
        "models.connectors.c_abstractor:CAbstractor",
        "{name: c_abstractor, visual_tokens: 256}",
        {
            "visual_tokens": Option(
                SQUARE,
                "tokens of a view; may change later",
                default=144,
                reloadable=True,
                most=_MOST,
            ),
            "hidden": Option(WHOLE, "width of the blocks", default=1024, most=_WIDEST),
            "depth": Option(
                WHOLE, "blocks before the averaging, and after it", default=3, most=_DEEPEST
            ),
            "positions": Option(
                WHOLE,
                "side of the table of learned positions",
                default=24,
                most=1024,
            ),
        },
        ("Honeybee",),
    ),
    "gemma3": Part(
        "averaged cells, a norm and a matrix (Gemma 3)",
        "models.connectors.gemma3:Gemma3Projector",
        "{name: gemma3, visual_tokens: 256}",
        {
            "visual_tokens": Option(SQUARE, "tokens of a view", default=256, most=_MOST),
            "eps": Option(POSITIVE, "below the root of the norm", default=1e-6),
        },
    ),
    "linear": Part(
        "one linear layer per cell (LLaVA)",
        "models.connectors.linear:Linear",
        "{name: linear}",
    ),
    "mlp": Part(
        "a norm and a two-layer GELU MLP per cell (LLaVA-1.5)",
        "models.connectors.mlp:Mlp",
        "{name: mlp}",
        {"hidden": _HIDDEN, "norm": _NORM, "bias": _BIAS},
    ),
    "patch_merger": Part(
        "a norm, blocks of cells as one, an MLP (Qwen2-VL)",
        "models.connectors.patch_merger:PatchMerger",
        "{name: patch_merger, norm: rms}",
        {
            "factor": Option(WHOLE, "side of a block", default=2, most=64),
            "norm": Option(one_of("layer", "rms"), "Qwen2.5-VL's is rms", default="layer"),
            "norm_after": Option(FLAG, "over a block, not a cell", default=False),
            "hidden": Option(
                WHOLE, "width between the two layers", otherwise="a block's", most=_WIDEST
            ),
            "levels": Option(
                WHOLE, "layers of the encoder, for deepstack", default=1, most=_DEEPEST
            ),
        },
    ),
    "pixel_shuffle": Part(
        "blocks of cells as one wide cell, then an MLP (InternVL)",
        "models.connectors.pixel_shuffle:PixelShuffle",
        "{name: pixel_shuffle, factor: 2}",
        {
            "factor": Option(
                WHOLE,
                "side of a block",
                default=2,
                most=64,
            ),
            "layers": Option(WHOLE, "2: norm and MLP; 1: a linear layer", default=2),
            "hidden": _HIDDEN,
            "bias": Option(FLAG, "of a single layer; Idefics3 has none", default=True),
        },
    ),
    "q_former": Part(
        "a BERT whose learned queries read the cells (BLIP-2)",
        "models.connectors.q_former:QFormer",
        "{name: q_former, path: weights/blip2-opt-2.7b}",
        {
            "path": Option(FOLDER, "a BLIP-2 to start from, with its sizes", otherwise="random"),
            "text": Option(FLAG, "also reads what is asked (InstructBLIP)", default=False),
            "visual_tokens": Option(WHOLE, "queries, so tokens of a view", default=32, most=_MOST),
            "hidden": Option(
                WHOLE, "width of the BERT, divided by the heads", default=768, most=_WIDEST
            ),
            "depth": Option(WHOLE, "its layers", default=12, most=_DEEPEST),
            "heads": Option(WHOLE, "its attention heads", default=12, most=_WIDEST),
            "inner": Option(WHOLE, "width inside its MLPs", default=3072, most=_WIDEST),
            "cross_every": Option(
                WHOLE, "every how many layers read the cells", default=2, most=_DEEPEST
            ),
        },
        ("BLIP-2", "InstructBLIP"),
    ),
    "resampler": Part(
        "learned queries that read the cells (Flamingo's Perceiver)",
        "models.connectors.resampler:Resampler",
        "{name: resampler, visual_tokens: 64}",
        {
            "visual_tokens": Option(WHOLE, "queries, so tokens of a view", default=64, most=_MOST),
            "hidden": Option(WHOLE, "width of the layers", otherwise="encoder's", most=_WIDEST),
            "depth": Option(WHOLE, "layers", default=3, most=_DEEPEST),
            "heads": Option(WHOLE, "attention heads", default=16, most=_WIDEST),
            "head_width": Option(WHOLE, "width of each", default=96, most=_WIDEST),
        },
        ("Perceiver", "Perceiver resampler"),
    ),
}
"""Name → what it is; the order of `mllm models`."""
