"""One rank's way through a stage: from the lock on its folder to the marker in it."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.utils import logging as transformers_logging

from data_packing.account import account
from data_packing.ledger import Refusal
from data_packing.loader import Loader
from data_packing.loss_weights import Weighting
from data_packing.plan import Plan
from data_packing.planned import Cursor
from data_packing.wording import counted
from mllm.recipe import Recipe
from mllm.training import build, checkpoint, comm_op, engine, export, groups, loop, masters
from mllm.training.checkpoint_index import State, newest, read_state
from mllm.training.control import Control
from mllm.training.run_folder import Lock, RunFolder, append_line, keep_lines_up_to, read_lines
from mllm.training.sources import parent_id
from mllm.training.step import TrainStep

T = TypeVar("T")
VERSIONS = ("torch", "transformers", "deepspeed", "peft")


class Worker:
    """One rank's way through a stage."""

    def __init__(self, recipe: Recipe, control: Control) -> None:
        self.recipe = recipe
        self.control = control
        self.folder = RunFolder(recipe.output)

    def run(self) -> bool:
        """Train the stage, from the lock to the marker. The process group must be there.

        Returns:
            False when it was asked to stop before the end; the state is saved.
        """
        self.control.meet()
        lock = self._take_lock()
        try:
            return self._stage()
        finally:
            lock.release()

    def _stage(self) -> bool:
        recipe, control, folder = self.recipe, self.control, self.folder
        world, rank = dist.get_world_size(), dist.get_rank()
        # rank 0 alone looks: on a shared disk others may see late what the stage before wrote
        identity = from_rank_0(lambda: recipe.identity() | {"model.parent": parent_id(recipe)})
        from_rank_0(lambda: folder.check_same(identity))
        finished = from_rank_0(folder.finished)
        if finished is not None:
            control.part()
            dist.barrier()
            steps = counted(finished["steps"], "step")
            control.event(
                done="finished",
                step=finished["steps"],
                note=f"already finished ({steps}), in {folder.path}",
            )
            return True

        control.phase("loading the model")
        precision = self._precision()
        model, processor, adapters = self._model(engine.DTYPES[precision])
        placement = self._placement(model, precision, world)
        step = TrainStep(model, recipe.objectives, recipe.data.packing.tokens)
        parameter_groups = groups.parameter_groups(model, recipe.train, recipe.optimizer)
        plan = self._plan(model, processor, rank, world)
        home = self._resumed(plan)
        control.phase("checking the weights")
        frozen = from_rank_0(lambda: checkpoint.frozen_hash(step))
        state = self._state(home, plan.hash, frozen)
        if rank == 0:
            folder.begin(recipe, self._facts(identity, plan, placement, world))
            for path in (folder.metrics, folder.refused):
                keep_lines_up_to(path, state.step)
            self._write_ledger(plan, state)

        if home is not None:
            checkpoint.load_weights(step, home)
        elif recipe.model.connector is not None and recipe.model.connector.init == "ridge":
            self._ridge(step, processor, plan)
        control.phase("starting the engine")
        accumulation = engine.accumulation_steps(plan.packs_per_step, world)
        deepspeed_engine = engine.start(step, recipe, placement, parameter_groups, accumulation)
        if home is not None:
            checkpoint.load(deepspeed_engine, home)
        else:
            masters.prepare(deepspeed_engine, 0)  # a first step that is skipped would leave none
            masters.pack(deepspeed_engine)

        ended = self._train(deepspeed_engine, processor, plan, state, accumulation)
        if ended:
            control.phase("saving the model")
            facts = {
                "steps": state.step,
                "tokens": state.tokens,
                "seconds": round(state.seconds, 3),
                "recipe": recipe.hash(),
                "plan": plan.hash,
            }
            if rank == 0:
                self._write_ledger(plan, state)
            export.finish(deepspeed_engine, processor, recipe, folder, adapters, facts)
        deepspeed_engine.destroy()
        control.part()
        dist.barrier()
        control.event(done="finished" if ended else "stopped", step=state.step)
        return ended

    def _take_lock(self) -> Lock:
        """Rank 0 keeps other runs out of the folder for as long as it lives."""
        lock = Lock(self.folder.path / "worker.lock")
        if not from_rank_0(lock.acquire):
            raise ValueError(
                f"{self.folder.path}: another run is writing there (process {lock.holder()}); "
                "wait for it or give another run.output"
            )
        return lock

    def _precision(self) -> str:
        """What the model computes in; a run that goes on keeps what it began with."""
        begun = self.folder.begun()
        if begun is not None and self.recipe.run.precision == "auto":
            return str(begun["precision"])
        precision, why = engine.choose_precision(self.recipe)
        if why:
            self.control.note(f"precision: {precision} ({why})")
        return precision

    def _model(self, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        """Model with `requires_grad` set, processor, and the adapters' configurations."""
        torch.manual_seed(self.recipe.run.seed)
        return build.model(self.recipe.model, self.recipe, dtype)

    def _placement(self, model: Any, precision: str, world: int) -> engine.Placement:
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        zero, why = engine.choose_zero(self.recipe, precision, world, total, trained)
        if why:
            self.control.note(f"zero: {zero} ({why})")
        return engine.Placement(precision, zero)

    def _plan(self, model: Any, processor: Any, rank: int, world: int) -> Plan:
        """Rank 0 counts what has not been counted of the first window, the others read its counts.

        Later windows are counted while training, by all ranks, each beginning at its own place.
        """
        workers, share = max(1, self.recipe.data.workers), rank / world
        if rank != 0:
            dist.barrier()
        phase, file = self.control.phase, self.folder.windows
        seen = {record["window"]: record["fingerprint"] for record in read_lines(file)}

        def tell(window: int, fingerprint: str) -> None:
            if rank == 0 and window not in seen:
                append_line(file, {"window": window, "fingerprint": fingerprint})

        plan = build.plan(
            self.recipe, model, processor, workers, phase, share=share, seen=seen, tell=tell
        )
        if rank == 0:
            dist.barrier()
        phase("planning")
        self.control.note(build.outline(plan))
        return plan

    def _resumed(self, plan: Plan) -> Path | None:
        """The checkpoint to go on from: the newest that is whole, as rank 0 sees it."""
        home, warnings = from_rank_0(lambda: newest(self.folder.state))
        for warning in warnings:
            self.control.note(warning)
        if home is None and warnings:
            self.control.note("no checkpoint is whole: starting from the beginning")
        if home is None:
            return None
        state = read_state(home)
        try:
            same = state.plan == plan.hash
            plan.check(Cursor.from_json(state.cursor))
        except ValueError:
            same = False
        if not same:
            raise ValueError(
                f"{home}: the data changed since this run began (or its processor did), so it "
                f"cannot go on exactly; restore the data, or delete {self.folder.path} to start "
                "anew"
            )
        return home

    def _state(self, home: Path | None, plan: str, frozen: str) -> State:
        if home is None:
            return State(
                step=0,
                cursor=Cursor().to_json(),
                plan=plan,
                frozen=frozen,
                seed=self.recipe.run.seed,
                seconds=0.0,
                tokens=0,
            )
        state = read_state(home)
        if state.frozen != frozen:
            raise ValueError(
                f"{home}: the frozen weights are not those that this run began with; restore "
                f"them, or delete {self.folder.path} to start anew"
            )
        self.control.note(f"going on from step {state.step}")
        return state

    def _facts(
        self, identity: dict[str, Any], plan: Plan, placement: engine.Placement, world: int
    ) -> dict[str, Any]:
        begun = self.folder.begun() or {}
        return {
            "plan": plan.hash,
            "steps": plan.total_steps,
            "seed": self.recipe.run.seed,
            "parent": self.recipe.model.from_,
            "precision": placement.precision,
            "zero": placement.zero,
            "ranks": world,
            "device": self._device(),
            "versions": {name: version(name) for name in VERSIONS},
            "python": platform.python_version(),
            "started": begun.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
            "identity": json.loads(json.dumps(identity)),
        }

    @staticmethod
    def _device() -> str:
        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
        return f"CPU, {os.cpu_count()} cores"

    def _write_ledger(self, plan: Plan, state: State) -> None:
        """What became of every document up to here; what is still to come counts as unreached."""
        ledger = account(plan, Cursor.from_json(state.cursor)).ledger
        ledger.drop(
            Refusal(record["source"], record["key"], record["reason"], record.get("first_piece"))
            for record in read_lines(self.folder.refused)
        )
        ledger.write(self.folder.ledger)

    def _ridge(self, step: TrainStep, processor: Any, plan: Plan) -> None:
        """Solve the connector's last layer on rank 0 and give it to all."""
        from mllm.models import ridge

        self.control.phase("solving the connector's last layer")
        model = step.model
        if dist.get_rank() == 0:
            report = ridge.warm_start(model, processor, plan.first.indexes, self.recipe.run.seed)
            self.control.note(
                f"ridge start from {report.examples} captions explains "
                f"{report.explained:.0%} of the variance of their embeddings"
            )
        device = get_accelerator().current_device_name()
        for parameter in model.connector.parameters():
            shared = parameter.data.to(device)  # NCCL moves nothing that is not on a GPU
            dist.broadcast(shared, 0)
            parameter.data.copy_(shared)

    def _train(
        self,
        deepspeed_engine: Any,
        processor: Any,
        plan: Plan,
        state: State,
        accumulation: int,
    ) -> bool:
        recipe, control = self.recipe, self.control
        loader = Loader(
            plan,
            processor.encode,
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            workers=recipe.data.workers,
            cursor=Cursor.from_json(state.cursor),
            image_bytes=processor.image_bytes,
            weighting=Weighting(recipe.data.loss_weights, recipe.uses),
        )

        control.phase("training", step=state.step, steps=plan.total_steps)
        training = loop.Loop(
            deepspeed_engine,
            recipe,
            self.folder,
            state,
            plan.total_steps,
            accumulation,
            lambda: control.stop_requested,
            checkpoint.Saver(self.folder.state, recipe.run.keep or checkpoint.KEPT),
            control.metric,
            lambda activity: control.event(activity=activity),
        )
        return training.run(loader)


def from_rank_0(ask: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank (collective); what it refuses is refused on every rank."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = ask()
        except ValueError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise ValueError(found[1])
    return cast(T, found[0])


def start_processes(control: Control) -> None:
    """Threads, accelerator and process group of this rank."""
    local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads_per_rank(local))
    comm_op.ensure(control.phase)
    control.phase("starting DeepSpeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's, of torch's collectives
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(timeout=datetime.timedelta(hours=2))
    dist.barrier()
    comm_op.forget_buffer(dist.get_rank())
    dist.barrier()


def threads_per_rank(ranks: int) -> int:
    """Compute threads of one rank: the cores this process may use, shared out evenly."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given and given.isdigit():
        return max(1, int(given))
    return max(1, len(os.sched_getaffinity(0)) // ranks)
