"""Connectors that can start from somebody's published weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from mllm.models.connectors.base import Connector
from mllm.models.errors import loading, read_json
from mllm.models.weight_files import check_weight_files

_FILE = "model.safetensors"


class PretrainedConnector(Connector):
    """A connector whose option `path` names a folder (or hub id) to start from.

    Sizes are read from the folder before anything is built and stored in its place: a trained model
    is rebuilt from its own config.json, wherever the folder has gone.
    """

    @classmethod
    @abstractmethod
    def spec_from_folder(cls, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Return the spec with `path` replaced by the sizes that its configuration says.

        Raises:
            ValueError: not such a folder, or a file is missing or damaged.
        """

    @abstractmethod
    def load_weights(self, path: str | Path) -> None:
        """Load the weights of the folder (or hub id).

        Raises:
            ValueError: missing, cut short, or of another shape.
        """


def read_weights(path: str | Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the tensors whose names begin so from a folder's (or hub id's) safetensors.

    The other tensors of the files, a language model's for example, are never in memory.

    Raises:
        ValueError: a file is missing or damaged.
    """
    check_weight_files(path, "connector")
    found: dict[str, Tensor] = {}
    with loading("connector weights", path):
        for file in _files(path, prefixes):
            with safe_open(file, framework="pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith(prefixes)]  # noqa: SIM118
                found.update({name: tensors.get_tensor(name) for name in names})
    return found


def _files(path: str | Path, prefixes: tuple[str, ...]) -> list[str]:
    index = cached_file(
        str(path), f"{_FILE}.index.json", _raise_exceptions_for_missing_entries=False
    )
    if index is None:
        names = {_FILE}
    else:
        places = read_json(Path(index))["weight_map"]
        names = {file for name, file in places.items() if name.startswith(prefixes)}
    files = [cached_file(str(path), name) for name in sorted(names)]
    return [file for file in files if file is not None]
