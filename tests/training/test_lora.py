"""Adapters on GPT-2, whose linear layers store their weights the other way round."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from mllm.recipe import LoraSection
from mllm.training import lora

PREFIX = "language_model"
IDS = torch.tensor([[5, 17, 3, 40, 8]])


class Whole(torch.nn.Module):
    """Shaped as a model is."""

    def __init__(self, language_model: torch.nn.Module) -> None:
        super().__init__()
        self.language_model = language_model


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=12,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def adapted(section: LoraSection) -> tuple[Any, Any]:
    """GPT-2 with adapters that change it, and their configuration."""
    model = gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = lora.inject(model, section)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model, config


@pytest.mark.parametrize("targets", [None, ("c_attn",), ("c_proj", "c_fc")])
def test_merged_and_reloaded_they_compute_the_same(
    targets: tuple[str, ...] | None, tmp_path: Path
) -> None:
    model, config = adapted(LoraSection(rank=3, alpha=5.0, targets=targets))
    assert set(config.target_modules) == set(targets or ("c_attn", "c_proj", "c_fc"))
    wanted = logits(model)
    assert (wanted - logits(gpt2())).abs().max() > 0.1

    whole = Whole(model)
    weights = dict(whole.named_parameters())
    plain = gpt2()
    merged = lora.merged(weights, whole)
    assert merged.keys() == dict(Whole(plain).named_parameters()).keys()
    missing = plain.load_state_dict(
        {name.removeprefix(f"{PREFIX}."): weight for name, weight in merged.items()}, strict=False
    )
    assert missing.unexpected_keys == []
    torch.testing.assert_close(logits(plain), wanted, atol=1e-5, rtol=1e-5)

    lora.save(weights, PREFIX, config, "gpt2", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(tensors) == len([name for name in weights if ".lora_" in name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again: Any = PeftModel.from_pretrained(gpt2(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)


def test_adapters_alone_learn() -> None:
    model, _ = adapted(LoraSection(rank=2))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 4
    assert all(".lora_" in name for name in trained)


def test_a_target_that_is_no_linear_layer() -> None:
    with pytest.raises(ValueError, match="'c_atn' is no linear layer .* did you mean 'c_attn'"):
        lora.inject(gpt2(), LoraSection(rank=2, targets=("c_atn",)))
