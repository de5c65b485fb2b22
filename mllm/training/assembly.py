"""The model of a recipe before any training, saved and counted: what `mllm assemble` does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_packing.files import sync_folder
from mllm.models.assemble import assemble as build
from mllm.models.processor import Processor
from mllm.precisions import as_dtype
from mllm.recipe import Parts
from mllm.training import groups, lora
from mllm.training.export import weights_id
from mllm.training.parameters import parameter_table
from mllm.training.run_folder import ASSEMBLED, full_disk_is_clear, settle, write_atomically

EXAMPLES = ((224, 224), (640, 480), (1920, 1080))
"""(width, height) of images whose tokens are told."""

NO_TEMPLATE = (
    "The tokenizer has no chat template. Captions, pages and plain texts can be trained on and "
    "continued; conversations are refused, and so is mllm chat. For those choose an "
    "instruction-tuned language model, or put a chat_template.jinja beside its tokenizer and "
    "assemble again."
)
RIDGE = (
    "init: ridge needs data: the connector's last layer is random here, and solved when a recipe "
    "that says so is trained from the parts."
)


def assemble(parts: Parts, output: Path | None, dtype: str, console: Console | None = None) -> None:
    """Build the model of a recipe, save it and print what it is.

    Args:
        parts: of the recipe.
        output: the folder to save; None reads no weights and saves nothing.
        dtype: as `precisions.precision`.
        console: where to print.

    Raises:
        ValueError: as `mllm.models.assemble.assemble`; a key of `train` that fits no module; or the
            folder holds something else.
        NoSpace: the disk is full; the folder is as it was.
    """
    console = console or Console()
    if output is not None:
        check_output(output)
    model, processor = build(parts.model, as_dtype(dtype), weights=output is not None)
    with _saved(model, processor, parts, output):
        if parts.train:
            _prepare(model, parts)
        table = parameter_table(model, trains=bool(parts.train), dtypes=True)
    console.print(table)
    console.print(image_table(processor))
    for line in _remarks(parts, processor):
        console.print(line, markup=False, highlight=False)
    for line in _saving(output):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def check_output(output: Path) -> None:
    """Refuse a folder that holds anything but an assembled model.

    Raises:
        ValueError: what it is, and what to do.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"--output {output} is a file; give the name of a folder")
    names = {path.name for path in output.iterdir()}
    if names and (ASSEMBLED not in names or names & {"run.json", "FINISHED"}):
        raise ValueError(
            f"--output {output} holds something else ({min(names)}); give another folder, or "
            "delete it"
        )


def image_table(processor: Processor) -> Table:
    """What images of some sizes cost: tokens of the text, and what the language model sees."""
    table = Table(title="An image")
    for name in ("pixels", "tokens", "visual tokens", "views", "vision patches"):
        table.add_column(name, justify="right")
    for width, height in EXAMPLES:
        tokens, patches = processor.image_cost(height, width)
        layout = processor.layout(height, width)
        counts = (tokens, layout.visual, len(layout.sizes), patches)
        table.add_row(f"{width} × {height}", *(f"{count:,}" for count in counts))
    return table


def _prepare(model: Any, parts: Parts) -> None:
    """Set what learns, as a run would."""
    groups.freeze(model, parts.train)
    lora.adapt(model, parts.train, 0)
    groups.parameter_groups(model, parts.train, parts.optimizer)


@contextmanager
def _saved(model: Any, processor: Processor, parts: Parts, output: Path | None) -> Iterator[None]:
    """Write the model as it is now; it gets its name when the block was left without an error."""
    if output is None:
        yield
        return
    draft = output.parent / f".{output.name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with full_disk_is_clear(output):
            draft.mkdir(parents=True)
            model.save_pretrained(draft)
            processor.save_pretrained(draft)
            said = parts.model.model_dump(mode="json", by_alias=True, exclude_none=True)
            facts = {"model": said, "weights": weights_id(draft)}
            write_atomically(draft / ASSEMBLED, json.dumps(facts, indent=2) + "\n")
            settle(draft)
        yield
        _rename(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename(draft: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.replace(output, old)
    os.replace(draft, output)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(output.parent)


def _remarks(parts: Parts, processor: Processor) -> Iterator[str]:
    """What a person should know beside the tables."""
    connector = parts.model.connector
    if connector is not None and connector.init == "ridge":
        yield RIDGE
    if not processor.tokenizer.chat_template:
        yield NO_TEMPLATE


def _saving(output: Path | None) -> Iterator[str]:
    if output is None:
        yield "Nothing was saved: no weights were read."
        return
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 2**20
    yield f"{size:,.1f} MiB in {output}; a recipe goes on from it with"
    yield f"    model: {{from: {output}}}"
