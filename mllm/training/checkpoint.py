"""Training state on disk: ours, without pickle, for any ZeRO stage and any number of ranks.

    state/step-00000100/
        index.json                what is where, its size and its SHA-256; step, cursor, hashes
        00-0000.safetensors …     "<parameter>/master" and its moments, full tensors

Parameter i is written by rank i % world, so all ranks write at once. Every rank copies its share
to host memory between two steps; a thread writes it while training goes on, under another name;
when all ranks have written theirs, rank 0 adds the index and renames the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_packing.files import sync_folder
from mllm.training import masters
from mllm.training.checkpoint_index import DRAFT, INDEX, State, homes, read_state
from mllm.training.run_folder import NoSpace, full_disk_is_clear, write_atomically

FILE_BYTES = 256 * 2**20
KEPT = 2
"""Checkpoints that stay while a stage trains, when the recipe does not say."""

File = tuple[str, dict[str, Tensor], list[str]]
"""Name, tensors, and the parameters they belong to."""


@dataclass(slots=True)
class _Writing:
    """A checkpoint on its way to the disk: this rank's files, and what became of them."""

    state: State
    draft: Path
    files: deque[File]
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: Exception | None = None
    thread: Thread | None = None

    def write(self) -> None:
        """Write this rank's files; a file's memory is free as soon as it is written."""
        try:
            with full_disk_is_clear(self.draft):
                self.draft.mkdir(parents=True, exist_ok=True)
            while self.files:
                name, tensors, names = self.files.popleft()
                self.written[name] = _write(self.draft / name, tensors) | {"parameters": names}
        except Exception as error:  # told to all ranks by `Saver.settle`
            self.failure = error


class Saver:
    """Writes checkpoints while training goes on, one at a time (all methods are collective).

    Args:
        folder: the run's `state/`. What a killed run left unfinished there is removed.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._writing: _Writing | None = None
        if dist.get_rank() == 0:
            for draft in folder.glob(f"{DRAFT}*"):
                shutil.rmtree(draft, ignore_errors=True)
        dist.barrier()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written (the same on all ranks)."""
        return self._writing is not None

    @property
    def ended(self) -> bool:
        """Whether this rank has written its share, or failed to; others may not have."""
        thread = self._writing.thread if self._writing is not None else None
        return thread is not None and not thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its share."""
        return self.ended and self._writing is not None and self._writing.failure is not None

    def begin(self, engine: Any, state: State) -> None:
        """Copy everything to host memory and start to write; waits for the one before.

        Args:
            engine: DeepSpeed's, between two steps.

        Raises:
            As `settle`, for the one before.
        """
        self.settle()
        state = replace(state, saved=time.time(), groups=_group_names(engine), files={})
        draft = self.folder / f"{DRAFT}{home_name(state)}"
        with masters.readable(engine):
            files = deque(_share(engine, dist.get_rank(), dist.get_world_size()))
        self._writing = _Writing(state, draft, files)
        self._writing.thread = Thread(target=self._writing.write, daemon=True, name="checkpoint")
        self._writing.thread.start()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is whole on the disk.

        Raises:
            NoSpace: on every rank, when one of them found no space; the checkpoints written
                before are kept.
            RuntimeError: on every rank, when one could not write for another reason.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        assert writing.thread is not None
        writing.thread.join()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (writing.written, _told(writing.failure)))
        try:
            _raise_first([told for _, told in everyone])
            writing.state.files = {
                name: facts for files, _ in everyone for name, facts in files.items()
            }
            _commit(writing.draft, self.folder / home_name(writing.state), writing.state, self.keep)
        except Exception:
            if dist.get_rank() == 0:
                shutil.rmtree(writing.draft, ignore_errors=True)
            raise


def home_name(state: State) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{state.step:08d}"


Told = tuple[bool, str] | None
"""An error as other ranks learn of it: whether there was no space, and the message."""


def _told(error: Exception | None) -> Told:
    if error is None:
        return None
    return isinstance(error, NoSpace), str(error) or type(error).__name__


def _raise_first(told: list[Told]) -> None:
    """Raise the first of the ranks' errors, the same one on every rank."""
    for error in told:
        if error is not None:
            no_space, text = error
            raise NoSpace(text) if no_space else RuntimeError(f"saving a checkpoint: {text}")


def _share(engine: Any, rank: int, world: int) -> Iterator[File]:
    """Copies of this rank's share, a file at a time. Every rank takes part in every gathering."""
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    size = number = 0
    for i, (name, parameter) in enumerate(masters.named_trainable(engine.module)):
        full = masters.read(engine, parameter)
        if i % world != rank:
            continue
        names.append(name)
        for key, value in full.items():
            tensors[f"{name}/{key}"] = saved = value.detach().to("cpu", copy=True)
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


def _commit(draft: Path, home: Path, state: State, keep: int) -> None:
    """Rank 0 writes the index, renames, and removes what is too old; the others wait."""
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            with full_disk_is_clear(draft):
                write_atomically(draft / INDEX, json.dumps(asdict(state), indent=1))
                sync_folder(draft)
                if home.exists():
                    shutil.rmtree(home)
                os.rename(draft, home)
                sync_folder(home.parent)
                for old in homes(home.parent)[:-keep]:
                    shutil.rmtree(old)
        except OSError as error:
            failure = error
    told: list[Told] = [_told(failure)]
    dist.broadcast_object_list(told, 0)
    _raise_first(told)


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
    masters.prepare(engine, state.step - state.skipped)
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
