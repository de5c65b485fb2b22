"""Low-rank adapters on the language model: put in, merged, and saved in PEFT's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mllm.recipe import LoraSection
from mllm.recipe_yaml import nearest

ADAPTER = "default"


def inject(language_model: nn.Module, section: LoraSection) -> LoraConfig:
    """Put adapters into a language model and make them, and nothing else in it, trainable.

    Call it with the same torch seed on every rank: A is drawn at random, B is zero.

    Args:
        language_model: a transformers causal LM; changed in place.
        section: rank, alpha (default 2 x rank), dropout, targets (default: every linear layer but
            the head).

    Returns:
        The PEFT configuration, for `save`.

    Raises:
        ValueError: when a target names no linear layer.
    """
    targets = list(section.targets) if section.targets is not None else linear_names(language_model)
    known = linear_names(language_model)
    for target in targets:
        if target not in known:
            raise ValueError(
                f"train.language_model.lora.targets: {target!r} is no linear layer of the "
                f"language model{nearest(target, known)}"
            )
    trained = {n for n, p in language_model.named_parameters() if p.requires_grad}
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha if section.alpha is not None else 2 * section.rank,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(
            isinstance(module, Conv1D) and name.split(".")[-1] in targets
            for name, module in language_model.named_modules()
        ),
    )
    inject_adapter_in_model(config, language_model, ADAPTER)
    for name, parameter in language_model.named_parameters():
        plain = plain_name(name)
        if plain is None:
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(plain in trained)
            if plain in trained and plain != name:
                raise ValueError(
                    f"train: language_model.{plain} would be trained in full and carries an "
                    "adapter too; choose one, or leave it out of lora.targets"
                )
    return config


def linear_names(language_model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers but the head, in the model's order.

    GPT-2's `Conv1D` is one too: a linear layer whose weight is stored as [in, out].
    """
    names: dict[str, None] = {}
    for name, module in language_model.named_modules():
        last = name.split(".")[-1]
        if isinstance(module, nn.Linear | Conv1D) and last != "lm_head" and not name.count("lora_"):
            names[last] = None
    return list(names)


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
            trained in (fp32 masters).
        model: tells where the adapters are and how they are scaled.
    """
    result = {plain: w for name, w in weights.items() if (plain := plain_name(name)) is not None}
    for name, layer in adapters(model):
        a_RI = weights[f"{name}.lora_A.{ADAPTER}.weight"].float()
        b_OR = weights[f"{name}.lora_B.{ADAPTER}.weight"].float()
        change = (b_OR @ a_RI) * layer.scaling[ADAPTER]
        if isinstance(layer.get_base_layer(), Conv1D):  # [in, out], not [out, in]
            change = change.T
        base = result[f"{name}.weight"]
        result[f"{name}.weight"] = (base.float() + change).to(base.dtype)
    return result


def save(
    weights: Mapping[str, Tensor], prefix: str, config: LoraConfig, base: str, folder: Path
) -> None:
    """Write the adapters alone, as `PeftModel.from_pretrained(language_model, folder)` reads them.

    Args:
        weights: full weights under the model's own names.
        prefix: the language model's place in the model, e.g. "language_model".
        config: what `inject` returned.
        base: where the weights under the adapters came from.
        folder: made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in weights.items():
        if name.startswith(prefix + ".") and ".lora_" in name:
            inner = name.removeprefix(prefix + ".").replace(f".{ADAPTER}.", ".")
            tensors[f"base_model.model.{inner}"] = weight.detach().contiguous().cpu().float()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    saved: Any = config
    saved.base_model_name_or_path = base
    saved.inference_mode = True
    saved.save_pretrained(str(folder))
