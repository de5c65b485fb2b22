"""What it takes to begin from somebody's whole model and to give it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor


class Read(Protocol):
    """From a class's folder to our model."""

    def __call__(
        self, path: str | Path, dtype: torch.dtype | str, weights: bool = True
    ) -> tuple[MultimodalModel, Processor]:
        """Return our model in eval mode and its processor.

        Args:
            path: their folder or hub id.
            dtype: of all weights; "auto" keeps the saved one.
            weights: False reads none and builds on the meta device.

        Raises:
            ValueError: something in it that cannot be built here.
        """
        ...


Write = Callable[[MultimodalModel, Processor, Path], None]
"""(model, processor, folder to write) -> nothing; plain transformers loads the folder.

ValueError: what the class cannot hold, before anything is written.
"""


@dataclass(frozen=True, slots=True)
class Composite:
    """A class of transformers that holds an encoder, a connector and a language model.

    Attributes:
        name: what `mllm export --to` calls it; kept as `origin` of a model that was read from it.
        read: from its folder to our model.
        write: from our model to its folder.
        body: where the class has the body of the language model; `{}` is the body's name in ours.
    """

    name: str
    read: Read
    write: Write
    body: str = "model.language_model."
