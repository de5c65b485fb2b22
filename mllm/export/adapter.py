"""A LoRA adapter beside the weights that it was trained on, instead of merged into them.

A stage saves merged weights and the adapter alone, so its part is taken out again: W - s B A, in
fp32. What PEFT adds later is then what was merged, to the rounding of fp32. In half precision the
merged weights were rounded to a few thousandths of themselves, and what is left after taking out
would be rounded once more: refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm.models.errors import loading
from mllm.models.modeling import MultimodalModel

HOLDERS = {
    "blip2": "language_model.model.",
    "llava": "model.language_model.",
    "llava_next": "model.language_model.",
    "llava_onevision": "model.language_model.",
    "transformers": "model.language_model.",
}
"""Export → where its classes have the language model's body."""

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(slots=True)
class Adapter:
    """What a stage's `lora/` holds.

    Attributes:
        config: PEFT's.
        weights: A and B by their names there.
    """

    config: Any
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read it.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        if not (folder / _FILE).is_file():
            raise ValueError(
                f"--adapter: there is no {folder / _FILE}; this stage was trained without LoRA"
            )
        with loading("adapter", folder):
            return cls(LoraConfig.from_pretrained(str(folder)), load_file(folder / _FILE))

    @torch.no_grad()
    def take_out(self, model: MultimodalModel) -> None:
        """Subtract it from the language model's weights.

        Raises:
            ValueError: weights in half precision, or an adapter of another model.
        """
        if model.dtype != torch.float32:
            name = str(model.dtype).removeprefix("torch.")
            raise ValueError(
                f"--adapter: the merged weights are in {name}, and the adapter cannot be taken out "
                "of them in that precision; give --dtype float32, or leave --adapter out"
            )
        if self.config.use_dora:
            raise ValueError(
                "--adapter: DoRA cannot be taken out of merged weights; leave --adapter out"
            )
        linears = dict(model.language_model.named_modules())
        scale = self.config.lora_alpha / self.config.r
        for name in self._layers():
            if name not in linears:
                raise ValueError(f"--adapter: the language model has no layer {name}")
            a_RI, b_OR = (self.weights[f"{_PREFIX}{name}.lora_{one}.weight"] for one in "AB")
            weight: Any = linears[name].weight
            weight -= (b_OR @ a_RI) * scale

    def write(self, model: MultimodalModel, place: str, folder: Path) -> None:
        """Write it for the exported classes, as `PeftModel.from_pretrained(model, folder)` reads.

        Args:
            place: where they have the language model's body.
        """
        language_model = model.language_model
        body = language_model.base_model
        old = next(name for name, one in language_model.named_modules() if one is body)
        renamed = {
            name.replace(f"{_PREFIX}{old}.", _PREFIX + place, 1): weight
            for name, weight in self.weights.items()
        }
        folder.mkdir()
        save_file(renamed, folder / _FILE, metadata={"format": "pt"})
        (folder / _FILE).chmod(0o644)
        lasts = sorted({name.rpartition(".")[2] for name in self._layers()})
        self.config.target_modules = rf"{re.escape(place)}.*\.({'|'.join(lasts)})"
        self.config.base_model_name_or_path = ""
        self.config.save_pretrained(str(folder))

    def _layers(self) -> list[str]:
        """The layers that carry it, by their names in the language model."""
        ending = ".lora_A.weight"
        names = [name for name in self.weights if name.endswith(ending)]
        return [name.removeprefix(_PREFIX).removesuffix(ending) for name in names]
