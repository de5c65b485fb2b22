"""Weights in 4 bits under adapters: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

NF4 in blocks of 64 whose scales are quantised once more, by bitsandbytes. Such a weight is a uint8
parameter of another shape that never learns; everything that asks a parameter how large it is, or
what it holds, asks here. The optimizer must not be given one: under ZeRO-2 DeepSpeed would average
its gradient among the others of the bucket, in bytes, and raise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OWN = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")
"""What bitsandbytes adds to the state dict under a weight's name."""


def quantise(module: nn.Module, names: Iterable[str], key: str) -> None:
    """Put linear layers into 4 bits, in place; those on the meta device stay as they are.

    Args:
        module: holds the layers.
        names: their paths in it; all are `nn.Linear`.
        key: the recipe's, for the message.

    Raises:
        ValueError: bitsandbytes is missing, or a layer is of another kind (GPT-2's Conv1D).
    """
    layers = {name: module.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"train.{key}.qlora: {key}.{name} is a {type(layer).__name__}, which bitsandbytes "
                "cannot hold in 4 bits; use lora"
            )
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(
            f"train.{key}.qlora needs bitsandbytes: pip install bitsandbytes, or use lora"
        ) from None
    for name, layer in layers.items():
        if not layer.weight.is_meta:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, _in_4_bits(bitsandbytes, layer))


def _in_4_bits(bitsandbytes: Any, linear: Any) -> nn.Module:
    options = {"compress_statistics": True, "quant_type": "nf4"}
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        device="meta",
        **options,
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, module=layer, **options
    )
    if linear.bias is not None:
        layer.bias = linear.bias
    # On some processors it would repack its weights in eval mode, for good and not of every shape.
    layer.support_avx512bf16_for_cpu = False
    moved: nn.Module = layer.to(linear.weight.device).train(linear.training)
    return moved


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter is in 4 bits."""
    return getattr(parameter, "quant_state", None) is not None


def numel(parameter: Tensor) -> int:
    """How many weights a parameter stands for."""
    shape = parameter.quant_state.shape if is_quantised(parameter) else parameter.shape  # type: ignore[attr-defined]
    return int(torch.Size(shape).numel())


def plain(parameter: Tensor, data: Tensor) -> Tensor:
    """A parameter's weights as they are computed with.

    Args:
        parameter: of the model.
        data: its whole contents, which ZeRO-3 has to gather.
    """
    if not is_quantised(parameter):
        return data
    from bitsandbytes.functional import dequantize_4bit

    weights: Tensor = dequantize_4bit(data, parameter.quant_state)  # type: ignore[attr-defined]
    return weights


def is_own(name: str) -> bool:
    """Whether an entry of a state dict is how a weight is packed, and no weight."""
    return any(part in OWN for part in name.split("."))


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Put empty linear layers into the places of quantised ones, to count what they compute."""
    packed = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and is_quantised(child.weight)
    ]
    for parent, name, child in packed:
        bias = child.bias is not None
        layer = nn.Linear(child.in_features, child.out_features, bias=bias, device="meta")
        setattr(parent, name, layer)
    try:
        yield
    finally:
        for parent, name, child in packed:
            setattr(parent, name, child)
