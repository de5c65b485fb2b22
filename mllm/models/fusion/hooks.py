"""Where a fusion reaches into a language model: forward hooks on its layers, for one call.

No layer is replaced and none of its code is touched, so any causal LM of transformers will do.
The hooks of a call act in that call alone: two threads may run one model.

B rows, T tokens of a row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Change = Callable[[Tensor, Tensor], Tensor]
"""Takes what passes a place and what entered the module there; returns what passes instead."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A change of what passes one place of the language model.

    Attributes:
        layer: number of the decoder layer, from 0.
        change: for a whole layer both of its arguments are hidden states [B, T, D].
        after: change what leaves the place; otherwise what enters.
        part: dotted path of a module inside the layer, e.g. "self_attn.q_proj"; "" is the layer.
    """

    layer: int
    change: Change
    after: bool = False
    part: str = ""


_running: ContextVar[object] = ContextVar("fused_call", default=None)
FORGETS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)
"""Whether checkpointing calls a whole layer again, whose hooks are gone by then; from transformers
5.23 on it repeats the layer's forward alone, and the hooks stay outside."""


def decoder_layers(body: nn.Module, count: int) -> nn.ModuleList:
    """Find the list of a language model's `count` decoder layers, whatever its family calls it.

    Raises:
        ValueError: there is no such list.
    """
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(body).__name__} has no list of its {count} layers, so nothing can be added to some "
        "of them; use fusion in_sequence"
    )


@contextmanager
def hooked(body: nn.Module, count: int, hooks: Sequence[Hook]) -> Iterator[None]:
    """Put hooks into a language model of `count` layers for what runs inside.

    Raises:
        ValueError: a layer or a part that the model does not have, one that did not run, or one
            that gradient checkpointing would run again without its hook.
    """
    if not hooks:
        yield
        return
    call, ran = object(), set[int]()
    layers = decoder_layers(body, count)
    with ExitStack() as stack:
        for number, hook in enumerate(hooks):
            handle = _put(_module(layers, hook), hook, call, ran, number)
            stack.callback(handle.remove)
        token = _running.set(call)
        stack.callback(_running.reset, token)
        yield
    if len(ran) < len(hooks):
        missing = next(hook for number, hook in enumerate(hooks) if number not in ran)
        raise ValueError(
            f"{type(body).__name__} did not run its layer {missing.layer}, which visual tokens "
            "were to reach"
        )


def _module(layers: nn.ModuleList, hook: Hook) -> nn.Module:
    layer = layers[hook.layer]
    checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    if not hook.part:
        if checkpointed and FORGETS_HOOKS:
            raise ValueError(
                "gradient checkpointing in transformers before 5.23 would run layers again without "
                "their visual features; turn it off, use fusion in_sequence or update transformers"
            )
        return layer
    if checkpointed:
        raise ValueError(
            f"gradient checkpointing would run {hook.part} again without its visual features; turn "
            "it off"
        )
    try:
        return layer.get_submodule(hook.part)
    except AttributeError as error:
        raise ValueError(f"{type(layer).__name__} has no part {hook.part}") from error


def _put(module: nn.Module, hook: Hook, call: object, ran: set[int], number: int) -> Any:
    """Register one hook; it gives and takes the first tensor, and leaves the others."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _running.get() is not call:
            return None
        ran.add(number)
        entered = _first(args, kwargs)
        changed = hook.change(entered, entered)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, _NAME: changed})

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if _running.get() is not call:
            return None
        ran.add(number)
        entered = _first(args, kwargs)
        if isinstance(out, tuple):
            return (hook.change(out[0], entered), *out[1:])
        return hook.change(out, entered)

    if hook.after:
        return module.register_forward_hook(after, with_kwargs=True)
    return module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)


_NAME = "hidden_states"


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = args[0] if args else kwargs[_NAME]
    assert isinstance(value, Tensor)
    return value
