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
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mllm.models.composites import COMPOSITES
from mllm.models.errors import loading
from mllm.models.modeling import MultimodalModel

HOLDERS = {
    "transformers": "model.language_model.",
    **{composite.name: composite.body for composite in COMPOSITES.values()},
}
"""Export → where its classes have the language model's body; `{}` is the body's name in ours."""

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
            ValueError: there is none, it is damaged, or DoRA's.
        """
        if not (folder / _FILE).is_file():
            others = sorted(path.name for path in folder.parent.glob(f"{folder.name}_*"))
            raise ValueError(
                f"--adapter: there is no {folder / _FILE}; this stage "
                + (
                    f"has adapters of other modules ({', '.join(others)}), which are always "
                    "merged; leave --adapter out"
                    if others
                    else "was trained without LoRA"
                )
            )
        with loading("adapter", folder):
            found = cls(LoraConfig.from_pretrained(str(folder)), load_file(folder / _FILE))
        if found.config.use_dora:
            raise ValueError(
                "--adapter: DoRA cannot be taken out of merged weights; leave --adapter out"
            )
        return found

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
        linears = dict(model.language_model.named_modules())
        scale = self.config.lora_alpha / self.config.r
        for name in self._layers():
            if name not in linears:
                raise ValueError(f"--adapter: the language model has no layer {name}")
            a_RI, b_OR = (self.weights[f"{_PREFIX}{name}.lora_{one}.weight"] for one in "AB")
            weight: Any = linears[name].weight
            turned = isinstance(linears[name], Conv1D)  # [in, out], not [out, in]
            part_OI = (b_OR @ a_RI) * scale
            part = part_OI.T if turned else part_OI
            if part.shape != weight.shape:
                raise ValueError(
                    f"--adapter: the adapter of the layer {name} is for weights of shape "
                    f"{list(part.shape)}, the language model's are {list(weight.shape)}"
                )
            weight -= part

    def write(self, model: MultimodalModel, place: str, folder: Path) -> None:
        """Write it for the exported classes, as `PeftModel.from_pretrained(model, folder)` reads.

        Args:
            place: where they have the language model's body; `{}` is the body's name in ours.
        """
        language_model = model.language_model
        body = language_model.base_model
        old = next(name for name, one in language_model.named_modules() if one is body)
        place = place.format(old)
        renamed = {
            name.replace(f"{_PREFIX}{old}.", _PREFIX + place, 1): weight
            for name, weight in self.weights.items()
        }
        folder.mkdir()
        save_file(renamed, folder / _FILE, metadata={"format": "pt"})
        (folder / _FILE).chmod(0o644)
        carried = {name.removeprefix(f"{old}.") for name in self._layers()}
        self.config.target_modules = re.escape(place) + _pattern(carried, body)
        self.config.base_model_name_or_path = ""
        self.config.save_pretrained(str(folder))

    def _layers(self) -> list[str]:
        """The layers that carry it, by their names in the language model."""
        ending = ".lora_A.weight"
        names = [name for name in self.weights if name.endswith(ending)]
        return [name.removeprefix(_PREFIX).removesuffix(ending) for name in names]


def _pattern(names: set[str], body: nn.Module) -> str:
    """Return a pattern that of all modules of a body these match.

    By the last parts of names, as people read them, where they say no more than that.
    """
    lasts = sorted({name.rpartition(".")[2] for name in names})
    named = {name for name, _ in body.named_modules() if name.rpartition(".")[2] in lasts}
    if named == names:
        return rf".*\.({'|'.join(lasts)})"
    return f"({'|'.join(map(re.escape, sorted(names)))})"
