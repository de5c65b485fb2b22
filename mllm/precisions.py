"""How people write the precision of weights on the command line. Nothing here imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm.recipe_yaml import nearest

if TYPE_CHECKING:
    import torch

_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
AUTO = "auto"


def precision(text: str) -> str:
    """Return torch's name of a precision, written as bf16 or as bfloat16, or `auto`.

    Raises:
        ValueError: none of these; the nearest is suggested.
    """
    known = {AUTO: AUTO, **_NAMES, **{name: name for name in _NAMES.values()}}
    if text not in known:
        raise ValueError(f"--dtype {text} is not known{nearest(text, known)}")
    return known[text]


def as_dtype(text: str) -> torch.dtype | str:
    """Return torch's precision of a text, `auto` as it is; errors as `precision`."""
    import torch

    name = precision(text)
    if name == AUTO:
        return AUTO
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
