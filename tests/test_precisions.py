"""How precisions are spelt."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from mllm import cli
from mllm.precisions import as_dtype, precision


def test_both_spellings_are_one_precision() -> None:
    for short, long in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        assert precision(short) == precision(long) == long
        assert as_dtype(short) is as_dtype(long) is getattr(torch, long)
    assert as_dtype("auto") == "auto"


@pytest.mark.parametrize("command", [["assemble", "r.yaml"], ["export", "folder", "out"]])
def test_every_command_takes_both(command: list[str]) -> None:
    for dtype in ("bf61", "bfloat61"):
        error = CliRunner().invoke(cli.app, [*command, "--dtype", dtype]).exception
        assert f"--dtype {dtype} is not known; did you mean" in str(error)
    for dtype in ("bf16", "bfloat16"):
        error = CliRunner().invoke(cli.app, [*command, "--dtype", dtype]).exception
        assert error is not None
        assert "--dtype" not in str(error)
