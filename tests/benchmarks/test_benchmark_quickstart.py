from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quickstart import Seed, commands, markdown, read_costs
from mllm.evaluation.measure import BARS

RECIPES = Path(__file__).parents[2] / "recipes" / "quickstart"


def options(command: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in command if "=" in word)


def test_every_stage_starts_from_the_one_before_of_the_same_seed(tmp_path: Path) -> None:
    found = commands(RECIPES, 7, tmp_path, 2, ["optimizer.warmup=0.2"])
    names = [name for name, _ in found]
    assert names == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    for number, (name, command) in enumerate(found):
        given = options(command)
        assert given["run.seed"] == "7"
        assert given["run.output"] == str(tmp_path / name)
        assert given["optimizer.warmup"] == "0.2"
        assert given.get("model.from") == (str(tmp_path / names[number - 1]) if number else None)
        assert command[-2:] == ["--cpus", "2"]


def seed(number: int, gap: float) -> Seed:
    figures: dict[str, Any] = {
        name: {"value": bar.limit, "low": 0.0, "high": 2.0, "parts": {}}
        for name, bar in BARS.items()
    }
    figures["caption_gap"]["value"] = gap
    stage = {
        "name": "1_align",
        "steps": 3,
        "tokens": 1000,
        "seconds": 2.0,
        "tokens_per_second": 500.0,
        "first_loss": 5.0,
        "last_loss": None,
    }
    return Seed(number, Path("x"), {}, {"figures": figures, "stages": [stage]})


def test_the_page_names_bars_that_some_seed_missed() -> None:
    good = markdown([seed(0, 1.1), seed(1, 1.3)], [], "the command")
    row = next(line for line in good.splitlines() if line.startswith("| Caption loss gap"))
    assert "| +1.10 | +1.30 | +1.20 | +1.10 to +1.30 | ≥ +1.00 nats/token |" in row
    assert row.endswith("reached by every seed |")
    assert "not reached" not in good
    bad = markdown([seed(0, 1.1), seed(1, 0.9)], [], "the command")
    row = next(line for line in bad.splitlines() if line.startswith("| Caption loss gap"))
    assert "not reached by every seed" in row
    assert "`the command`" in bad


def test_a_figure_without_a_value_gives_its_reason() -> None:
    one = seed(0, 1.1)
    one.report["figures"]["choice"] = {"reason": "too few | captions"}
    page = markdown([one], [], "c")
    assert "too few \\| captions" in page
    assert next(x for x in page.splitlines() if "Caption choice" in x).count("–") >= 3


def test_costs_of_a_run_without_notes(tmp_path: Path) -> None:
    assert read_costs(tmp_path) == {}
    (tmp_path / "cost.json").write_text("{")
    assert read_costs(tmp_path) == {}
