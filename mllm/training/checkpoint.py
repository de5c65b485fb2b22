"""Training state on disk: ours, without pickle, for any ZeRO stage and any number of ranks.

    state/step-00000100/
        index.json                what is where, its size and its SHA-256; step, cursor, hashes
        00-0000.safetensors …     "<parameter>/master" and its moments, full tensors

Parameter i is written by rank i % world, so all ranks write at once and none holds more than a
file's worth. The folder is written under another name and renamed when all of it is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_packing.files import sync_folder
from mllm.training import masters
from mllm.training.run_folder import full_disk_is_clear, write_atomically

FILE_BYTES = 256 * 2**20
KEPT = 2
FORMAT = 1


@dataclass(slots=True)
class State:
    """What a checkpoint says about the run, beside the tensors.

    Attributes:
        step: steps done.
        cursor: where the data plan goes on.
        plan: hash of the data plan.
        frozen: hash of everything that does not train.
        seed: the recipe's.
        seconds: training time so far.
        tokens: useful tokens so far.
        groups: parameter → name of its group.
        files: file name → {"bytes": size, "sha256": hex, "parameters": names}.
    """

    step: int
    cursor: dict[str, int | str]
    plan: str
    frozen: str
    seed: int
    seconds: float
    tokens: int
    groups: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


def save(engine: Any, state: State, folder: Path) -> Path:
    """Write a checkpoint and remove all but the newest two (collective).

    Args:
        engine: DeepSpeed's, between two steps.
        state: `groups` and `files` are filled in here.
        folder: the run's `state/`.

    Raises:
        NoSpace: on the rank that could not write; `PeerFailed` on the others. The checkpoints
            written before are kept.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    home = folder / f"step-{state.step:08d}"
    draft = folder / f".writing-{home.name}"
    if rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    dist.barrier()
    written: dict[str, dict[str, Any]] = {}
    failure: Exception | None = None
    try:
        with masters.readable(engine):
            for name, tensors, names in _batches(engine, rank, world):
                if failure is None:
                    try:
                        written[name] = _write(draft / name, tensors) | {"parameters": names}
                    except Exception as error:  # every rank must reach the next collective
                        failure = error
    finally:
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, (written, failure is not None))
    if any(failed for _, failed in everyone):
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        if failure is not None:
            raise failure
        raise PeerFailed("another rank could not write the checkpoint")
    state.files = {name: facts for files, _ in everyone for name, facts in files.items()}
    state.groups = _group_names(engine)
    _commit(draft, home, state, rank)
    return home


class PeerFailed(RuntimeError):
    """Another rank has the error message."""


def _batches(
    engine: Any, rank: int, world: int
) -> Iterator[tuple[str, dict[str, Tensor], list[str]]]:
    """This rank's share, a file at a time. Every rank takes part in every gathering."""
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    size = number = 0
    for i, (name, parameter) in enumerate(masters.named_trainable(engine.module)):
        full = masters.read(engine, parameter)
        if i % world != rank:
            continue
        names.append(name)
        for key, value in full.items():
            tensors[f"{name}/{key}"] = saved = value.detach().cpu().clone()
            size += saved.nbytes
        if size >= FILE_BYTES:
            yield f"{rank:02d}-{number:04d}.safetensors", tensors, names
            tensors, names, size, number = {}, [], 0, number + 1
    if tensors:
        yield f"{rank:02d}-{number:04d}.safetensors", tensors, names


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    data = safetensors.torch.save(tensors)
    with full_disk_is_clear(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _commit(draft: Path, home: Path, state: State, rank: int) -> None:
    """Rank 0 writes the index, renames, and removes what is too old; the others wait."""
    failure: Exception | None = None
    if rank == 0:
        try:
            write_atomically(draft / "index.json", json.dumps(asdict(state), indent=1))
            sync_folder(draft)
            if home.exists():
                shutil.rmtree(home)
            os.rename(draft, home)
            sync_folder(home.parent)
            for old in sorted(home.parent.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
        except OSError as error:
            failure = error
    failed = torch.tensor(int(failure is not None))
    if dist.get_backend() == "nccl":
        failed = failed.cuda()
    dist.broadcast(failed, 0)
    if failure is not None:
        shutil.rmtree(draft, ignore_errors=True)
        raise failure
    if failed.item():
        raise PeerFailed("rank 0 could not write the checkpoint")


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and one warning for each that is not.

    Every file's size is checked here and its SHA-256 when it is loaded.
    """
    warnings: list[str] = []
    for home in sorted(folder.glob("step-*"), reverse=True):
        problem = damage(home)
        if problem is None:
            return home, warnings
        warnings.append(f"{home} is damaged ({problem}) and is not used")
    return None, warnings


def damage(home: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    try:
        state = read_state(home)
    except (OSError, ValueError, TypeError) as error:
        return f"index.json: {error}"
    for name, facts in state.files.items():
        path = home / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return f"{name} does not have the checksum it was written with"
    return None


def read_state(home: Path) -> State:
    """What index.json says. Raises ValueError for another format."""
    values = json.loads((home / "index.json").read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')}, this program reads {FORMAT}")
    return State(**values)


def load_weights(module: nn.Module, home: Path) -> None:
    """Before DeepSpeed: put the masters, rounded to the model's precision, into the model.

    Raises:
        ValueError: when the checkpoint's parameters are not those that train.
    """
    parameters = dict(masters.named_trainable(module))
    _check_names(set(parameters), read_state(home))
    with torch.no_grad():
        for name, full in _tensors(home):
            parameters[name].data.copy_(full["master"])


def load(engine: Any, home: Path) -> None:
    """After DeepSpeed: set exact masters, moments and step counters (call on every rank)."""
    parameters = dict(masters.named_trainable(engine.module))
    state = read_state(home)
    _check_names(set(parameters), state)
    masters.prepare(engine, state.step)
    for name, full in _tensors(home):
        masters.write(engine, parameters[name], full)
    masters.refresh(engine)


def _tensors(home: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for file, facts in read_state(home).files.items():
        tensors = safetensors.torch.load_file(home / file)
        for name in facts["parameters"]:
            whole = {key.rpartition("/"): tensor for key, tensor in tensors.items()}
            yield name, {key: tensor for (of, _, key), tensor in whole.items() if of == name}


def _check_names(trained: set[str], state: State) -> None:
    saved = {name for facts in state.files.values() for name in facts["parameters"]}
    if saved != trained:
        odd = sorted(saved ^ trained)
        raise ValueError(
            f"the checkpoint does not fit the model: {len(odd)} parameters are only in one of "
            f"them, first {odd[0]}"
        )


def _group_names(engine: Any) -> dict[str, str]:
    groups = getattr(engine, "mllm_groups", [])
    return {f"model.{name}": group.name for group in groups for name in group.parameters}


def frozen_hash(module: nn.Module) -> str:
    """Hash of every frozen parameter and every buffer that is saved, in the model's precision."""
    digest = hashlib.sha256()
    trained = {name for name, _ in masters.named_trainable(module)}
    for name, tensor in sorted(module.state_dict().items()):
        if name not in trained:
            digest.update(name.encode())
            data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
            digest.update(memoryview(data.numpy()))
    return digest.hexdigest()[:32]
