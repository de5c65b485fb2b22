"""The loop: fetch a step whole, agree on its weight, propagate, update, note, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_packing.ledger import Refusal, too_many
from data_packing.pack import Pack
from data_packing.planned import PlannedStep
from mllm.recipe import Recipe
from mllm.training import engine as engines
from mllm.training.checkpoint import State
from mllm.training.run_folder import RunFolder, append_line

SAVE_SECONDS = 300.0
"""Between two checkpoints when the recipe does not say."""


@dataclass(slots=True)
class Agreement:
    """What all ranks have to know of a step before anything is propagated.

    `weights` has the sum of every objective's weights; `learned` and `tokens` are counts.
    """

    weights: list[float]
    learned: int
    tokens: int
    refused: int
    stop: bool
    save: bool


JUDGED_FROM = 1000
"""Documents from which on the share that failed to decode is judged; fewer count as so many."""


@dataclass(slots=True)
class Loop:
    """One run's training.

    Attributes:
        engine: DeepSpeed's.
        state: where the run stands; moved on by every step.
        accumulation: micro-steps of every step.
        stop: whether this rank was asked to leave.
        save: writes a checkpoint of `state` (collective).
        tell: is given each line of metrics.jsonl.
        documents, refused: planned and failed since this start.
    """

    engine: Any
    recipe: Recipe
    folder: RunFolder
    state: State
    total_steps: int
    accumulation: int
    stop: Callable[[], bool]
    save: Callable[[State], None]
    tell: Callable[[dict[str, Any]], None]
    saved: float = 0.0
    saved_step: int = -1
    documents: int = 0
    refused: list[Refusal] = field(default_factory=list)

    def run(self, loader: Iterable[tuple[PlannedStep, list[Pack]]]) -> bool:
        """Train to the end. Returns False when it was asked to stop before; the state is saved."""
        self.saved, self.saved_step = time.monotonic(), self.state.step
        self.engine.train()
        started = time.monotonic()
        for planned, packs in loader:
            arrived = time.monotonic()
            agreed = self._agree(packs)
            self._step(planned, packs, agreed, started, arrived)
            if agreed.stop or agreed.save or self._due():
                self._save()
            if agreed.stop and self.state.step < self.total_steps:
                return False
            started = time.monotonic()
        if self.saved_step != self.state.step:
            self._save()
        return True

    def _agree(self, packs: list[Pack]) -> Agreement:
        """Sum what the ranks really have: documents may have been refused at decode."""
        late = (
            self.recipe.run.checkpoint_every is None
            and dist.get_rank() == 0
            and time.monotonic() - self.saved > SAVE_SECONDS
        )
        weights = torch.zeros(len(self.recipe.objectives), dtype=torch.float64)
        for pack in packs:
            weights += pack.weights.sum(1, dtype=torch.float64)
        sums = torch.tensor(
            [
                *weights.tolist(),
                sum(pack.learned for pack in packs),
                sum(pack.input_ids.numel() for pack in packs),
                sum(len(pack.refused) for pack in packs),
                int(self.stop()),
                int(late),
            ],
            dtype=torch.float64,  # counts up to 2**53 are exact in it
            device=self.engine.device,
        )
        dist.all_reduce(sums)
        *agreed, learned, tokens, refused, stop, save = sums.tolist()
        return Agreement(agreed, int(learned), int(tokens), int(refused), stop > 0, save > 0)

    def _step(
        self,
        planned: PlannedStep,
        packs: list[Pack],
        agreed: Agreement,
        started: float,
        arrived: float,
    ) -> None:
        step = planned.number
        assert step == self.state.step, f"the data is at step {step}, the run at {self.state.step}"
        rate = engines.set_lr(self.engine, step, self.total_steps, self.recipe.optimizer)
        loss, norm = self._propagate(step, packs, agreed.weights)
        self.state.step = step + 1
        self.state.cursor = planned.after.to_json()
        self.state.tokens += agreed.tokens
        ended = time.monotonic()
        self.state.seconds += ended - started
        self.documents += sum(len(pack.entries) for pack in planned.packs)
        self._note_refused(packs, agreed.refused)
        if dist.get_rank() == 0:
            record = {
                "step": self.state.step,
                "steps": self.total_steps,
                "loss": loss,
                "tokens": agreed.tokens,
                "learned": agreed.learned,
                "packs": len(planned.packs),
                "refused": agreed.refused,
                "lr": rate,
                "grad_norm": norm,
                "seconds": round(ended - started, 4),
                "wait": round(arrived - started, 4),
                "total_tokens": self.state.tokens,
                "total_seconds": round(self.state.seconds, 3),
            }
            append_line(self.folder.metrics, record)
            self.tell(record)

    def _propagate(self, step: int, packs: list[Pack], weights: list[float]) -> tuple[float, float]:
        """Forward and backward of every pack, then the update. Returns loss and gradient norm.

        Ranks average their gradients, so each multiplies its sums by the number of ranks and
        divides them by the objectives' weights in the whole step. An objective without weight
        in this step is divided by infinity: it adds nothing.
        """
        divisors = torch.tensor([w if w > 0 else math.inf for w in weights], dtype=torch.float64)
        divisors = divisors.to(self.engine.device)
        scales = (dist.get_world_size() / divisors).float()
        total = torch.zeros_like(divisors)
        for i in range(self.accumulation):
            sums = self._forward(step, packs[i] if i < len(packs) else Pack.empty(len(weights)))
            total += sums.detach().double()
            self.engine.backward((sums * scales).sum(), scale_wrt_gas=False)
            if i == self.accumulation - 1:
                dist.all_reduce(total)
                loss = (total / divisors).sum().item()
                if not torch.isfinite(total).all():
                    raise ValueError(
                        f"the loss of step {step + 1} is {loss}. Lower the learning rate or raise "
                        "optimizer.warmup; the last checkpoint is from before."
                    )
                norm = engines.gradient_norm(self.engine)
            self.engine.step()
        return loss, float(self.engine.get_global_grad_norm()) if norm is None else norm

    def _forward(self, step: int, pack: Pack) -> Tensor:
        """The sum of every objective over the pack, [K]."""
        pack = pack.to(self.engine.device)
        seed(self.recipe.run.seed, step, pack.number)
        sums: Tensor = self.engine(
            pack.input_ids,
            pack.labels,
            pack.weights,
            pack.position_ids,
            pack.cu_seqlens,
            pack.pixels,
            pack.sizes,
            pack.order,
            pack.bags,
            pack.asked,
        )
        return sums

    def _note_refused(self, packs: list[Pack], refused: int) -> None:
        """Write down the documents that failed at decode, on whichever rank.

        Raises:
            ValueError: they are more than the recipe allows, on every rank alike.
        """
        if not refused:
            return
        mine = [refusal for pack in packs for refusal in pack.refused]
        everyone: list[list[Refusal]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        found = [refusal for refusals in everyone for refusal in refusals]
        if dist.get_rank() == 0:
            for refusal in found:
                append_line(self.folder.refused, {"step": self.state.step, **asdict(refusal)})
        self.refused += found
        judged = max(self.documents, JUDGED_FROM)
        too_many(self.refused, judged, self.recipe.data.max_refused, "documents read so far")

    def _due(self) -> bool:
        every = self.recipe.run.checkpoint_every
        return every is not None and self.state.step % every == 0

    def _save(self) -> None:
        self.save(self.state)
        self.saved, self.saved_step = time.monotonic(), self.state.step


def seed(run_seed: int, step: int, pack: int) -> None:
    """Make dropout a function of the seed, the step and the pack, so that it has no state.

    A pack draws the same masks on whichever rank and in whichever micro-step it is computed.
    """
    mixed = (run_seed * 1_000_003 + step) * 1_000_003 + pack + 1
    torch.manual_seed(mixed % (2**63))
