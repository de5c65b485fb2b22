"""Adapters on any module: put in, merged, and saved in PEFT's layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mllm.recipe import LoraSection, TrainSection
from mllm.recipe_yaml import nearest
from mllm.training import quantised
from mllm.training.groups import longest_match

ADAPTER = "default"
LANGUAGE_MODEL = "language_model"


def adapt(model: nn.Module, train: Mapping[str, TrainSection], seed: int) -> dict[str, LoraConfig]:
    """Put in the adapters that a recipe asks for, and make them trainable.

    A layer gets those of the longest key that covers it. Every draw begins with the seed, so that
    it is the same on every rank.

    Returns:
        Key of the recipe → PEFT's configuration, for `save`.

    Raises:
        ValueError: a key without linear layers, or a wrong target.
    """
    configs = {}
    for key, how in train.items():
        if how.adapters is None:
            continue
        module = model.get_submodule(key) if key in dict(model.named_modules()) else nn.Module()
        mine = [
            name for name in linear_layers(module) if longest_match(f"{key}.{name}", train) == key
        ]
        if not mine:
            raise ValueError(
                f"train.{key}: there is no linear layer inside {key} for adapters; name the "
                "module around it, and the layer in targets"
            )
        if how.qlora is not None:
            quantised.quantise(module, mine, key)
        torch.manual_seed(seed)
        configs[key] = inject(module, how.adapters, key=key, dora=how.dora is not None, among=mine)
    return configs


def inject(
    module: nn.Module,
    section: LoraSection,
    key: str = LANGUAGE_MODEL,
    dora: bool = False,
    among: list[str] | None = None,
) -> LoraConfig:
    """Put adapters into a module and make them, and nothing else in it, trainable.

    Call it with the same torch seed on every rank: A is drawn at random, B is zero.

    Args:
        module: a language model, an encoder, …; changed in place.
        section: rank, alpha (default 2 x rank), dropout, targets (default: every linear layer but
            the head).
        key: the recipe's, for messages and PEFT's task.
        dora: learn the norm of every row of a weight too.
        among: paths of the layers that may get adapters; all linear ones unless given.

    Returns:
        The PEFT configuration, for `save`.

    Raises:
        ValueError: when a target names no linear layer.
    """
    layers = linear_layers(module) if among is None else among
    known = _last_parts(layers)
    targets = list(section.targets) if section.targets is not None else known
    for target in targets:
        if target not in known:
            raise ValueError(
                f"train.{key}.lora.targets: {target!r} is no linear layer of the "
                f"{key.replace('_', ' ')}{nearest(target, known)}"
            )
    chosen = [name for name in layers if name.split(".")[-1] in targets]
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha if section.alpha is not None else 2 * section.rank,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        target_modules=_as_peft_finds_them(module, targets, chosen),
        bias="none",
        task_type="CAUSAL_LM" if key == LANGUAGE_MODEL else None,
        use_dora=dora,
        fan_in_fan_out=any(isinstance(module.get_submodule(name), Conv1D) for name in chosen),
    )
    four_bits = any(quantised.is_quantised(p) for p in module.parameters())
    with _told(module, is_loaded_in_4bit=four_bits):
        inject_adapter_in_model(config, module, ADAPTER)
    for name, parameter in module.named_parameters():
        plain = plain_name(name)
        if plain is None:
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(plain in trained)
            if plain in trained and plain != name:
                raise ValueError(
                    f"train: {key}.{plain} would be trained in full and carries an "
                    "adapter too; choose one, or leave it out of lora.targets"
                )
    return config


class _told:
    """Attributes of a module for as long as a block lasts."""

    def __init__(self, module: nn.Module, **values: Any) -> None:
        self.module, self.values = module, values

    def __enter__(self) -> None:
        self.before = {n: self.module.__dict__.get(n) for n in self.values}
        self.module.__dict__.update(self.values)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del self.module.__dict__[name]
            else:
                self.module.__dict__[name] = value


def _as_peft_finds_them(
    module: nn.Module, targets: list[str], chosen: list[str]
) -> list[str] | str:
    """The last parts of names, as people read them, or a pattern where they would say too much."""
    named = [
        name
        for name, _ in module.named_modules()
        if name.split(".")[-1] in targets and ".lora_" not in name
    ]
    return targets if sorted(named) == sorted(chosen) else "|".join(map(re.escape, chosen))


def linear_layers(module: nn.Module) -> list[str]:
    """Paths of all linear layers but a language model's head, in the model's order.

    GPT-2's `Conv1D` is one too: a linear layer whose weight is stored as [in, out]. The layer in
    torch's `MultiheadAttention` is none: its weight is used without calling it.
    """
    ask = getattr(module, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    names: list[str] = []
    closed: tuple[str, ...] = ()
    for name, child in module.named_modules():
        if isinstance(child, LoraLayer | nn.MultiheadAttention):
            closed += (f"{name}.",)
        if not name or name.startswith(closed) or isinstance(child, LoraLayer):
            continue
        last = name.split(".")[-1]
        if isinstance(child, nn.Linear | Conv1D) and last != "lm_head" and child is not head:
            names.append(name)
    return names


def linear_names(module: nn.Module) -> list[str]:
    """The last parts of the names of `linear_layers`, each once."""
    return _last_parts(linear_layers(module))


def _last_parts(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[-1] for name in names))


def plain_name(name: str) -> str | None:
    """A parameter's name without adapters, None for an adapter's own weight."""
    if ".lora_" in name or name.startswith("lora_"):
        return None
    return name.replace(".base_layer.", ".")


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every layer that carries an adapter, with its plain name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def merged(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights without adapters: each adapter is added to its layer in fp32, then cast back.

    Args:
        weights: full weights under the model's own names, adapters in the precision they were
            trained in (fp32 masters), nothing in 4 bits.
        model: tells where the adapters are and how they are scaled.
    """
    result = {plain: w for name, w in weights.items() if (plain := plain_name(name)) is not None}
    for name, layer in adapters(model):
        a_RI = weights[f"{name}.lora_A.{ADAPTER}.weight"].float()
        b_OR = weights[f"{name}.lora_B.{ADAPTER}.weight"].float()
        base = result[f"{name}.weight"]
        turned = isinstance(layer.get_base_layer(), Conv1D)  # [in, out], not [out, in]
        sum_OI = (base.T if turned else base).float() + (b_OR @ a_RI) * layer.scaling[ADAPTER]
        magnitude_O = weights.get(f"{name}.lora_magnitude_vector.{ADAPTER}.weight")
        if magnitude_O is not None:
            sum_OI = sum_OI * (magnitude_O.float() / sum_OI.norm(dim=1))[:, None]
        result[f"{name}.weight"] = (sum_OI.T if turned else sum_OI).to(base.dtype).contiguous()
    return result


def save(
    weights: Mapping[str, Tensor], prefix: str, config: LoraConfig, base: str, folder: Path
) -> None:
    """Write one module's adapters, as `PeftModel.from_pretrained(module, folder)` reads them.

    Args:
        weights: full weights under the model's own names.
        prefix: the module's place in the model, e.g. "language_model".
        config: what `inject` returned.
        base: where the weights under the adapters came from.
        folder: made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in weights.items():
        if name.startswith(prefix + ".") and ".lora_" in name:
            inner = name.removeprefix(prefix + ".").replace(f".{ADAPTER}.", ".")
            inner = inner.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
            tensors[f"base_model.model.{inner}"] = weight.detach().contiguous().cpu().float()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    saved: Any = config
    saved.base_model_name_or_path = base
    saved.inference_mode = True
    saved.save_pretrained(str(folder))


def folder_name(key: str) -> str:
    """Where a stage keeps the adapters of a key of the recipe."""
    return "lora" if key == LANGUAGE_MODEL else f"lora_{key}"
