"""Layer-wise decay of the learning rate: what lies near the input learns more slowly.

As vision transformers are fine-tuned after BEiT (Bao et al. 2021, arXiv 2106.08254) and MAE (He et
al. 2021, arXiv 2111.06377, appendix A.1): with n layers and a decay d, layer l (from 1) has
d^(n + 1 - l) of the rate, what is before the first layer d^(n + 1), and what is after the last all
of it.
"""

from __future__ import annotations

from torch import nn

MOST, LITTLE = 0.5, 0.1
"""A stack must hold this share of a module's weights to be its layers, and no other that one."""


def layer_rates(model: nn.Module, key: str, decay: float) -> dict[str, tuple[int, float]]:
    """Every parameter of the module `key`: its layer (0 is before the first), its factor.

    Args:
        model: of the recipe; adapters may be in it.
        key: dotted path of a module.
        decay: what each layer's rate is of that of the layer above.

    Raises:
        ValueError: the module has no stack of layers that holds most of its weights.
    """
    module = model.get_submodule(key) if key in dict(model.named_modules()) else nn.Module()
    stack = stack_of(module)
    if stack is None:
        raise ValueError(
            f"train.{key}.layer_decay: {key} has no stack of layers that holds most of its "
            "weights; name one that has (such as encoder), or leave layer_decay out"
        )
    path, count = stack
    rates: dict[str, tuple[int, float]] = {}
    layer = 0
    for name, _ in module.named_parameters():
        if name.startswith(path + "."):
            layer = int(name.removeprefix(path + ".").split(".")[0]) + 1
            number = layer
        else:
            number = count + 1 if layer else 0
        rates[f"{key}.{name}"] = (number, decay ** (count + 1 - number))
    return rates


def stack_of(module: nn.Module) -> tuple[str, int] | None:
    """Path and length of the list of layers that holds most of a module's weights, if one does."""
    whole = _size(module)
    stacks = [
        (path, child)
        for path, child in module.named_modules()
        if path and (isinstance(child, nn.ModuleList) or _stages(child))
    ]
    path, stack = max(stacks, key=lambda each: _size(each[1]), default=("", None))
    if stack is None or _size(stack) < MOST * whole:
        return None
    for other, child in stacks:
        apart = not f"{other}.".startswith(f"{path}.") and not f"{path}.".startswith(f"{other}.")
        if apart and _size(child) > LITTLE * whole:
            return None
    return path, len(stack)


def _stages(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 1


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
