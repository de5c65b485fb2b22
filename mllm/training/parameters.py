"""How many parameters a model has, and how many of them learn."""

from __future__ import annotations

from rich.table import Table
from torch import nn

from mllm.recipe import MODULES
from mllm.training.quantised import is_quantised, numel


def parameter_table(model: nn.Module, trains: bool = True, dtypes: bool = False) -> Table:
    """Parameters by module.

    Args:
        model: on any device, the meta device too.
        trains: say how many are trainable, and how many are in adapters.
        dtypes: say what they are in.
    """
    table = Table(title="Parameters")
    table.add_column("module")
    for name in ("all", *(("trainable", "in adapters") if trains else ())):
        table.add_column(name, justify="right")
    if dtypes:
        table.add_column("dtype")
    counts = {name: _count(model.get_submodule(name)) for name in MODULES}
    for name, row in counts.items():
        if name == "fusion" and not row[0]:
            continue  # in the sequence nothing learns
        _add(table, name, row[: 3 if trains else 1], model.get_submodule(name) if dtypes else None)
    table.add_section()
    together = [sum(numbers) for numbers in zip(*counts.values(), strict=True)]
    _add(table, "together", together[: 3 if trains else 1], model if dtypes else None)
    return table


def _count(module: nn.Module) -> list[int]:
    """Parameters without adapters, trainable ones, those in adapters; a tied one counts once."""
    row = [0, 0, 0]
    for name, parameter in module.named_parameters():
        row[2 if ".lora_" in name else 0] += numel(parameter)
        row[1] += parameter.numel() if parameter.requires_grad else 0
    return row


def _add(table: Table, name: str, numbers: list[int], module: nn.Module | None) -> None:
    cells = [f"{number:,}" for number in numbers]
    if module is not None:
        kinds = {
            "nf4" if is_quantised(each) else str(each.dtype).removeprefix("torch.")
            for each in module.parameters()
        }
        cells.append(", ".join(sorted(kinds)))
    table.add_row(name, *cells)
