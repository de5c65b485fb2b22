"""`mllm models`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mllm import cli
from mllm.parts import REGISTRIES
from mllm.parts.language_models import REFUSED, TESTED
from mllm.parts.listing import in_full, overview

RUNNER = CliRunner()


def printed(what: object) -> str:
    """As on a terminal of 80 columns."""
    console = Console(record=True, width=80, force_terminal=False)
    console.print(what)
    return console.export_text()


def test_everything_is_listed_in_80_columns() -> None:
    text = printed(overview())
    assert max(map(len, text.splitlines())) <= 80
    for registry in REGISTRIES:
        for name, part in registry.parts.items():
            assert f"{name} " in text
            assert part.summary in text
            assert all(f"    {option} " in text for option in part.options)
    words = " ".join(text.split())
    for kind in (*TESTED, *REFUSED):
        assert " ".join(kind.families) in words.replace(",", "")
    assert "…" not in text.replace(": …", "").replace("{path: …}", "").replace("[[rows", "")


def test_one_part_in_full() -> None:
    text = printed(in_full("q_former"))
    assert "arXiv \n2301.12597" in text
    assert "cross_every" in text
    assert "a whole number greater" in text
    assert text.rstrip().endswith("connector: {name: q_former, path: weights/blip2-opt-2.7b}")
    assert "    second: {name: dinov2, path: weights/dinov2-large" in printed(in_full("pair"))
    assert "Spec:" not in printed(in_full("dinov2"))


def test_language_models_by_any_spelling() -> None:
    for name in ("gpt_neox", "GPT-NeoX", "gptneox"):
        assert printed(in_full(name)).startswith("  GPT-NeoX: nothing")
    assert "Mamba: refused, a state over the tokens before" in printed(in_full("mamba"))
    assert printed(in_full("mixtral")).count("Mixtral") == 2


def test_an_unknown_name_suggests_the_nearest() -> None:
    for name, near in (("qformer", "q_former"), ("siglp", "siglip"), ("Gema", "Gemma")):
        with pytest.raises(ValueError, match=f"there is no part '{name}'; did you mean '{near}'"):
            in_full(name)


def test_scripts_read_json() -> None:
    result = RUNNER.invoke(cli.app, ["models", "--json"])
    values = json.loads(result.stdout)
    assert set(values) == {*(each.title for each in REGISTRIES), "language models"}
    depth = values["connectors"]["resampler"]["options"]["depth"]
    assert depth["default"] == 3
    assert not depth["required"]
    assert values["connectors"]["average_pool"]["options"]["visual_tokens"]["required"]
    one = json.loads(RUNNER.invoke(cli.app, ["models", "clip", "--json"]).stdout)
    assert list(one["encoders"]) == ["clip"]
    assert one["connectors"] == {}


def test_listing_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['mllm', 'models', 'pair']; from mllm.cli import app; "
        "app(standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "second: {name: dinov2" in done.stdout
