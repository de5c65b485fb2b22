"""Whether a folder's files of weights are whole, and whether the model took all that is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from mllm.models.errors import read_json

_FILE = "model.safetensors"
_INDEX = f"{_FILE}.index.json"
_UNREAD = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
_POINTER = b"version https://git-lfs"


def check_weight_files(path: str | Path, what: str) -> None:
    """Refuse a folder whose safetensors are missing, cut short or not named by their index.

    Only the beginning of each file is read. A hub id is left to the hub.

    Args:
        path: the folder.
        what: the part, for messages.

    Raises:
        ValueError: naming the folder, the file, and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    for name in _files(folder, what):
        _check_file(folder / name, what)


def check_shapes(path: str | Path, model: nn.Module, what: str) -> None:
    """Refuse a model that is another than the one that a folder has weights of, before it is built.

    Only the beginning of each file is read. Under older names weights are not found in the model;
    a model more than twice as large as all that is saved is refused all the same.

    Args:
        path: the folder, looked at with `check_weight_files`; a hub id is left to the hub.
        model: as config.json describes it, on the meta device.
        what: the part, for messages.

    Raises:
        ValueError: naming the folder, the first weight and both shapes, or both sizes.
    """
    folder, config = Path(path), getattr(model, "config", None)
    if not folder.is_dir() or getattr(config, "quantization_config", None):
        return
    saved = _shapes(folder, what)
    wrong = [
        (name, list(tensor.shape))
        for name, tensor in model.state_dict().items()
        # transformers turns some round while it reads them
        if name in saved and sorted(saved[name]) != sorted(tensor.shape)
    ]
    if wrong:
        first, shape = wrong[0]
        raise ValueError(
            f"{path}: {len(wrong)} weights of the {what} have another shape than config.json says, "
            f"{first} first ({list(saved[first])} in the file, {shape} by config.json); take both "
            "files from one checkpoint"
        )
    described = sum(weight.numel() for weight in model.parameters())
    held = sum(map(prod, saved.values()))
    if described > 2 * held:
        raise ValueError(
            f"{path}: config.json describes a {what} of {described:,} weights, the files hold "
            f"{held:,}; take both from one checkpoint"
        )


def _shapes(folder: Path, what: str) -> Mapping[str, Sequence[int]]:
    """The shape of every weight by its name."""
    result: dict[str, Sequence[int]] = {}
    for file in _files(folder, what):
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                result[name] = opened.get_slice(name).get_shape()
    return result


def _files(folder: Path, what: str) -> list[str]:
    """The names of the files that hold a folder's weights."""
    return [_FILE] if (folder / _FILE).is_file() else _shards(folder, what)


def _shards(folder: Path, what: str) -> list[str]:
    """The files that the index names."""
    if not (folder / _INDEX).is_file():
        raise ValueError(f"{what} {folder}: {_without(folder, what)}")
    places = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(one, str) for one in places.values()):
        raise ValueError(
            f"{what} {folder}: {_INDEX} has no weight_map, which says the file of each weight; "
            "copy the checkpoint's own"
        )
    files = sorted(set(places.values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(
            f"{what} {folder}: {len(missing)} of the {len(files)} weights files that {_INDEX} "
            f"names are missing, {missing[0]} first; copy or download them"
        )
    return files


def _without(folder: Path, what: str) -> str:
    """What to do with a folder that has no safetensors."""
    others = sorted(file.name for pattern in _UNREAD for file in folder.glob(pattern))
    if not others:
        return f"no file {_FILE}, so there are no weights; copy or download them"
    kind = "AutoModelForCausalLM" if what == "language model" else "AutoModel"
    return (
        f"{others[0]} is not read, only safetensors are (nothing is unpickled); download {_FILE}, "
        f"or convert the folder once in Python: from transformers import {kind} as kind; "
        f"folder = {str(folder)!r}; kind.from_pretrained(folder).save_pretrained(folder)"
    )


def _check_file(file: Path, what: str) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{what} {file.parent}: {file.name} is a pointer of Git LFS, not the weights; "
                "fetch them with `git lfs pull`"
            )
    try:
        with safe_open(file, framework="pt"):  # compares the header with the file's length
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{what} {file.parent}: {file.name} is damaged or cut short "
            f"({str(error).splitlines()[0]}); copy or download it again"
        ) from error


def check_all_used(
    unexpected: Iterable[Any], whole: nn.Module, path: str | Path, what: str
) -> None:
    """Refuse weights that belong to a part, and that its configuration has no place for.

    A folder may hold other towers, heads and objectives' layers, which nobody asked for. But what
    lies inside a block of the part, would be another block of it, or a weight of one of its modules
    shows that config.json describes another model.

    Args:
        unexpected: names that were not loaded, as transformers reports them: without those that it
            is told to ignore.
        whole: the part with all its layers, whether they are used or not.
        path: the folder.
        what: the part, for messages.

    Raises:
        ValueError: how many, and the first.
    """
    names = set(whole.state_dict())
    modules = {_numberless(name) for name, _ in whole.named_modules() if name}
    blocks = {
        _numberless(f"{name}.0.") for name, one in whole.named_modules() if _is_list(one) and name
    }
    extra = [
        name
        for name in sorted(map(str, unexpected))
        if name not in names
        and (
            _numberless(name.rpartition(".")[0]) in modules
            or any(_numberless(name).startswith(block) for block in blocks)
        )
    ]
    if extra:
        raise ValueError(
            f"{path}: {len(extra)} weights of the {what} have no place in the model that "
            f"config.json describes, {extra[0]} first (too few layers, or another kind of model); "
            "take both files from one checkpoint"
        )


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "#", name)
