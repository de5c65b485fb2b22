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
from data_packing.wording import counted, some
from mllm.recipe import Recipe
from mllm.training import engine as engines
from mllm.training.checkpoint import Saver
from mllm.training.checkpoint_index import State
from mllm.training.run_folder import RunFolder, append_line

SAVE_SECONDS = 300.0
"""Between two checkpoints when the recipe does not say."""


@dataclass(slots=True)
class Agreement:
    """What all ranks have to know of a step before anything is propagated.

    `weights` has the sum of every objective's weights; `learned` and `tokens` are counts;
    `settle` = the checkpoint that was being written is written, or some rank could not.
    """

    weights: list[float]
    learned: int
    tokens: int
    refused: int
    stop: bool
    save: bool
    settle: bool


@dataclass(slots=True)
class Outcome:
    """What a step came to, the same on every rank.

    Attributes:
        loss: the mean over the step's weights.
        norm: of the gradient, before clipping.
        odd: numbers of this rank's packs whose own loss was not finite.
    """

    loss: float
    norm: float
    odd: list[int]

    @property
    def problem(self) -> str | None:
        """Why the step changed nothing, None if it did."""
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        return None if math.isfinite(self.norm) else "the gradient is not finite"


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
        saver: writes checkpoints of `state`.
        tell: is given each line of metrics.jsonl.
        busy: told what the run waits for, "" when it goes on.
        documents, refused: planned and failed since this start.
    """

    engine: Any
    recipe: Recipe
    folder: RunFolder
    state: State
    total_steps: int
    accumulation: int
    stop: Callable[[], bool]
    saver: Saver
    tell: Callable[[dict[str, Any]], None]
    busy: Callable[[str], None]
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
            if agreed.settle:
                self.saver.settle()
            self._step(planned, packs, agreed, started, arrived)
            if agreed.stop or agreed.save or self._due():
                self._save()
            if agreed.stop and self.state.step < self.total_steps:
                self._settle()
                return False
            started = time.monotonic()
        if self.saved_step != self.state.step:
            self._save()
        self._settle()
        return True

    def _agree(self, packs: list[Pack]) -> Agreement:
        """Sum what the ranks really have: documents may have been refused at decode."""
        late = (
            self.recipe.run.checkpoint_every is None
            and dist.get_rank() == 0
            and not self.saver.busy
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
                int(self.saver.ended),
                int(self.saver.failed),
            ],
            dtype=torch.float64,  # counts up to 2**53 are exact in it
            device=self.engine.device,
        )
        dist.all_reduce(sums)
        *agreed, learned, tokens, refused, stop, save, ended, failed = sums.tolist()
        counts = (int(learned), int(tokens), int(refused))
        settle = failed > 0 or ended == dist.get_world_size()
        return Agreement(agreed, *counts, stop > 0, save > 0, settle)

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
        outcome = self._propagate(step, packs, agreed.weights)
        self.state.step = step + 1
        self.state.cursor = planned.after.to_json()
        self.state.tokens += agreed.tokens
        ended = time.monotonic()
        self.state.seconds += ended - started
        self.documents += sum(len(pack.entries) for pack in planned.packs)
        self._note_refused(packs, agreed.refused)
        skipped = self._note_outcome(packs, outcome)
        if dist.get_rank() == 0:
            record = {
                "step": self.state.step,
                "steps": self.total_steps,
                "loss": None if skipped else outcome.loss,
                "tokens": agreed.tokens,
                "learned": agreed.learned,
                "packs": len(planned.packs),
                "refused": agreed.refused,
                "lr": rate,
                "grad_norm": None if skipped else outcome.norm,
                "seconds": round(ended - started, 4),
                "wait": round(arrived - started, 4),
                "total_tokens": self.state.tokens,
                "total_seconds": round(self.state.seconds, 3),
                "total_skipped": self.state.skipped,
                **skipped,
            }
            append_line(self.folder.metrics, record)
            self.tell(record)
        if self.state.in_a_row > self.recipe.run.max_skipped:
            self._give_up(skipped)

    def _propagate(self, step: int, packs: list[Pack], weights: list[float]) -> Outcome:
        """Forward and backward of every pack, then the update, unless something is not finite.

        Ranks average their gradients, so each multiplies its sums by the number of ranks and
        divides them by the objectives' weights in the whole step. An objective without weight
        in this step is divided by infinity: it adds nothing.
        """
        divisors = torch.tensor([w if w > 0 else math.inf for w in weights], dtype=torch.float64)
        divisors = divisors.to(self.engine.device)
        scales = (dist.get_world_size() / divisors).float()
        total = torch.zeros_like(divisors)
        each: list[Tensor] = []
        loss = norm = 0.0
        for i in range(self.accumulation):
            sums = self._forward(step, packs[i] if i < len(packs) else Pack.empty(len(weights)))
            each.append(sums.detach())
            total += each[-1].double()
            scaled = (sums * scales).sum()
            if i == self.accumulation - 1:
                dist.all_reduce(total)
                loss = (total / divisors).sum().item()
                if not math.isfinite(loss):
                    scaled = scaled * math.nan  # what keeps a bad gradient out keeps this out too
            self.engine.backward(scaled, scale_wrt_gas=False)
            if i == self.accumulation - 1:
                norm = engines.update(self.engine)
            else:
                self.engine.step()
        finite = torch.isfinite(torch.stack(each)).all(1).tolist()
        return Outcome(loss, norm, [i for i, fine in enumerate(finite) if not fine])

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

    def _note_outcome(self, packs: list[Pack], outcome: Outcome) -> dict[str, Any]:
        """Count a step that changed nothing. Returns what metrics.jsonl says of it, {} otherwise.

        Its documents are those of the packs whose own loss is not finite; when only the gradient
        is not, nobody knows whose it is, and all of the step are named.
        """
        if outcome.problem is None:
            self.state.in_a_row = 0
            self.state.loss = outcome.loss
            return {}
        self.state.skipped += 1
        self.state.in_a_row += 1
        odd = [key for i in outcome.odd if i < len(packs) for key in packs[i].keys]
        everyone: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
        dist.all_gather_object(everyone, (odd, [key for pack in packs for key in pack.keys]))
        named = [key for keys, _ in everyone for key in keys]
        named = named or [key for _, keys in everyone for key in keys]
        named = list(dict.fromkeys(named))
        return {"skipped": outcome.problem, "documents": named}

    def _give_up(self, skipped: dict[str, Any]) -> None:
        """Stop, on every rank alike; what is being written is written first."""
        self._settle()
        raise ValueError(
            f"step {self.state.step} and the {counted(self.state.in_a_row - 1, 'step')} before it "
            f"were skipped ({skipped['skipped']}), more in a row than run.max_skipped "
            f"({self.recipe.run.max_skipped}) allows. Documents of the last: "
            f"{some(skipped['documents'])}; those of the others are in {self.folder.metrics}. "
            "Leave them out, lower the learning rate or raise optimizer.warmup; the last "
            f"checkpoint is of step {self.saved_step}."
        )

    def _due(self) -> bool:
        every = self.recipe.run.checkpoint_every
        return every is not None and self.state.step % every == 0

    def _save(self) -> None:
        self.busy("saving a checkpoint")
        self.saver.begin(self.engine, self.state)
        self.busy("")
        self.saved, self.saved_step = time.monotonic(), self.state.step

    def _settle(self) -> None:
        self.busy("saving a checkpoint")
        self.saver.settle()
        self.busy("")


def seed(run_seed: int, step: int, pack: int) -> None:
    """Make dropout a function of the seed, the step and the pack, so that it has no state.

    A pack draws the same masks on whichever rank and in whichever micro-step it is computed.
    """
    mixed = (run_seed * 1_000_003 + step) * 1_000_003 + pack + 1
    torch.manual_seed(mixed % (2**63))
