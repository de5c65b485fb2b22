"""`mllm models`."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mllm import cli
from mllm.parts import REGISTRIES, WHOLE_MODELS
from mllm.parts.language_models import REFUSED, TESTED
from mllm.parts.listing import PACKAGE, in_full, overview

RUNNER = CliRunner()
WORDS = {"DeepStack"}
"""Names of classes that are a paper's too."""


def printed(what: object) -> str:
    """As on a terminal of 80 columns."""
    console = Console(record=True, width=80, force_terminal=False)
    console.print(what)
    return console.export_text()


def test_everything_is_listed_in_80_columns() -> None:
    text = printed(overview())
    assert max(map(len, text.splitlines())) <= 80
    for registry in (*REGISTRIES, WHOLE_MODELS):
        for name, part in registry.parts.items():
            assert re.search(rf"^  {name}\s", text, re.MULTILINE)
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
        text = printed(in_full(name))
        assert text.startswith("GPT-NeoX  language models\ntested; beside causal attention")
    assert "refused, it has a state over the tokens before: it goes" in printed(in_full("mamba"))
    assert printed(in_full("mixtral")).count("Mixtral") == 2


SPELT = {
    "Qwen2-VL": ("qwen2_vl  encoders", "qwen2_vl  published models", "Qwen2-VL (text)  language"),
    "qwen2.5vl": ("qwen2_5_vl  encoders", "qwen2_5_vl  published models"),
    "Gemma3": ("gemma3  connectors", "gemma3  published models", "Gemma3 (text)  language models"),
    "SigLIP-2": ("siglip  encoders", "siglip2_naflex  encoders"),
    "BLIP2": ("blip2  encoders", "q_former  connectors", "blip2  published models"),
    "llava-1.5": ("llava  published models", "from: weights/llava-1.5-7b-hf"),
    "qformer": ("q_former  connectors",),
}


@pytest.mark.parametrize("name", SPELT)
def test_everything_of_a_name_is_found_however_it_is_spelt(name: str) -> None:
    text = printed(in_full(name))
    assert all(title in text for title in SPELT[name])
    result = RUNNER.invoke(cli.app, ["models", name, "--json"])
    found = [kind for kind, parts in json.loads(result.stdout).items() if parts]
    assert len(found) > 1  # language models are always there


def test_nothing_of_the_code_is_printed() -> None:
    sources = "".join(module.read_text() for module in PACKAGE.rglob("*.py"))
    own = set(re.findall(r"^class (\w+[a-z][A-Z]\w*)", sources, re.MULTILINE)) - WORDS
    for registry in (*REGISTRIES, WHOLE_MODELS):
        for name in registry.parts:
            text = printed(in_full(name))
            assert not own & set(re.findall(r"\w+", text)), name
            for word in ("Legend:", "Shapes:", "Spec:", "see below", "`_", "self."):
                assert word not in text, name


def test_the_published_models_are_those_that_are_read_and_written() -> None:
    from mllm.models.composites import COMPOSITES

    assert set(WHOLE_MODELS.parts) == {one.name for one in COMPOSITES.values()}


def test_an_unknown_name_suggests_the_nearest() -> None:
    for name, near in (("qforme", "q_former"), ("siglp", "siglip"), ("Gema", "Gemma")):
        with pytest.raises(ValueError, match=f"there is no part '{name}'; did you mean '{near}'"):
            in_full(name)


def test_a_part_of_a_name_suggests_all_that_contain_it() -> None:
    with pytest.raises(ValueError, match="did you mean .*'qwen2_vl', 'qwen3_vl' or 'qwen3_vl_moe'"):
        in_full("qwen")


def test_summaries_stand_in_one_column() -> None:
    lines = printed(overview()).splitlines()
    for registry in (*REGISTRIES, WHOLE_MODELS):
        for part in registry.parts.values():
            assert any(line[20:].rstrip() == part.summary for line in lines), part.summary


def test_what_most_encoders_take_is_said_once() -> None:
    text = printed(overview())
    assert text.count("    resize ") == 1
    assert "all but qwen2_vl, qwen2_5_vl, qwen3_vl and siglip2_naflex take\n    resize" in text


def test_scripts_read_json() -> None:
    result = RUNNER.invoke(cli.app, ["models", "--json"])
    values = json.loads(result.stdout)
    assert set(values) == {
        *(each.title for each in (*REGISTRIES, WHOLE_MODELS)),
        "language models",
    }
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
