"""What an exported folder's file says otherwise than the fusions of this package."""

from __future__ import annotations

DOCS = {
    "Fusion": "From token embeddings and visual tokens to what the language model computes with.",
    "Visual": "The visual tokens [K, E] of a call, and how many of them each image has.",
}
"""Docstrings that speak of training."""

NEVER = {
    "visual is not None and (not visual.images)",
    "not visual.images",
    "segments is None",
}
"""Conditions for a blank image, which is run in training where ranks wait for each other."""

REPLACED = {
    "attend": '''\
def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Attend from text tokens [S, H, E] to the visual tokens [K, H, E] of their segment: [S, H, E].

    No order among the visual tokens, no mask: a segment sees all of its own.
    """
    if segments.sees is not None:
        sees = segments.sees.to(key.device)
        key, value = (tensor.index_select(0, sees) for tensor in (key, value))
    return _sdpa(query, key, value, segments)'''
}
"""Without fused kernels: transformers wants every package that a file imports to be installed."""
