"""The rival of `benchmarks.training`: Hugging Face Trainer with padded batches, run by torchrun.

Same model, same data, same trainable parameters, as many useful tokens per step on average. One
line per step goes to `--metrics`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from data_packing.index import Index
from data_packing.pack import join_views
from data_packing.sample import IGNORED, Sample
from mllm.recipe import Recipe, load
from mllm.training import build, engine


class Documents(Dataset[Sample]):
    """Every document of the sources, encoded when it is asked for."""

    def __init__(self, indexes: list[Index], processor: Any) -> None:
        self.places = [
            (index, number)
            for index in indexes
            for number in range(len(index))
            if index.piece_start[number + 1] > index.piece_start[number]
        ]
        self.processor = processor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: int) -> Sample:
        index, number = self.places[at]
        return self.processor.encode(index.read(number))  # type: ignore[no-any-return]

    def lengths(self) -> list[int]:
        """Useful tokens of every document."""
        return [self._length(index, number) for index, number in self.places]

    def _length(self, index: Index, number: int) -> int:
        pieces = slice(index.piece_start[number], index.piece_start[number + 1])
        first, last = index.piece_image_start[[pieces.start, pieces.stop]]
        sizes = zip(index.height[first:last], index.width[first:last], strict=True)
        images: int = sum(self.processor.image_cost(int(h), int(w))[0] for h, w in sizes)
        return int(index.overhead[number] + index.piece_text[pieces].sum()) + images


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Pad on the right to the longest document of the batch."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = np.zeros((len(samples), longest), np.int64)
    labels = np.full_like(ids, IGNORED)
    mask = np.zeros_like(ids)
    for row, sample in enumerate(samples):
        size = len(sample.input_ids)
        ids[row, :size], labels[row, :size], mask[row, :size] = sample.input_ids, sample.labels, 1
    batch = {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(mask),
    }
    if views := [view for sample in samples for view in sample.pixels]:
        batch["pixels"], batch["sizes"] = join_views(views)
    return batch


class Padded(Trainer):
    """Trainer that counts useful tokens; optionally batches documents of like length."""

    grouped = False
    useful = 0
    places = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Count, then train as Trainer does."""
        self.useful += int(inputs["attention_mask"].sum())
        self.places += inputs["attention_mask"].numel()
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if not self.grouped:
            return super()._get_train_sampler(*args, **kwargs)
        size = self.args.per_device_train_batch_size * self.args.world_size
        generator = torch.Generator().manual_seed(self.args.seed)
        lengths = self.train_dataset.lengths()  # type: ignore[union-attr]
        return LengthGroupedSampler(size, lengths=lengths, generator=generator)


class Notes(TrainerCallback):
    """Writes one line per step: useful tokens and places of all ranks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trainer: Padded | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sum over the ranks and write."""
        assert self.trainer is not None
        counts = torch.tensor([self.trainer.useful, self.trainer.places])
        dist.all_reduce(counts)
        self.trainer.useful = self.trainer.places = 0
        if state.is_world_process_zero:
            line = {"step": state.global_step, "tokens": int(counts[0]), "places": int(counts[1])}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def batch_size(recipe: Recipe, lengths: list[int], ranks: int) -> int:
    """Documents of one rank's batch, so that a step has the recipe's useful tokens on average."""
    return max(1, round(recipe.run.tokens_per_step / (sum(lengths) / len(lengths)) / ranks))


def main() -> None:
    """Train some steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--grouped", action="store_true")
    options = parser.parse_args()
    recipe = load(options.recipe)
    precision, _ = engine.choose_precision(recipe)
    dtype = engine.DTYPES[precision]
    model, processor, _ = build.model(recipe.model, recipe, dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.accepts_loss_kwargs = False
    data = Documents(build.plan(recipe, model, processor, 1).first.indexes, processor)
    arguments = TrainingArguments(
        output_dir=str(options.metrics.parent / "trainer"),
        per_device_train_batch_size=batch_size(recipe, data.lengths(), 2),
        max_steps=options.steps,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() else "gloo",
        ddp_find_unused_parameters=False,
        dataloader_num_workers=recipe.data.workers,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=recipe.run.seed,
    )
    notes = Notes(options.metrics)
    trainer = Padded(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        callbacks=[notes],
    )
    trainer.grouped = options.grouped
    notes.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()
