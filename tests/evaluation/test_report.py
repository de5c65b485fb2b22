from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mllm.evaluation import report as reports
from mllm.evaluation.chart import loss_curve, smoothed
from mllm.evaluation.measure import BARS, HeldOutData
from mllm.evaluation.page import page
from mllm.evaluation.stages import last_finished, original_model, read_stages
from tests.evaluation.tiny import make_model, save_stage

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Checks that tags close in order, and gathers text and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished stages and one that was only begun."""
    root = tmp_path_factory.mktemp("run")
    model, processor = make_model(root / "parts")
    outputs = root / "out"
    for name in ("1_align", "2_instruct"):
        save_stage(outputs / name, model, processor, root / "parts" / "llama")
    begun = outputs / "3_later"
    begun.mkdir()
    (begun / "run.json").write_text("{}")
    (begun / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0, "tokens": 5}\n{"step": 2, "lo')
    return outputs


def test_the_whole_report(run: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = reports.main([str(run), "--data", str(data_folder), "--examples", "4"])
    output = capsys.readouterr().out
    assert status == 0
    assert "Caption loss gap" in output
    report = json.loads((run / "report.json").read_text())
    assert report["model"].endswith("2_instruct")
    assert set(report["figures"]) == set(BARS)
    assert all("value" in figure for figure in report["figures"].values())
    assert report["figures"]["choice"]["trials"] >= 500
    # nothing was trained; what is left is the share of the added rows of the vocabulary
    assert 0 <= report["figures"]["text"]["value"] < math.log(448 / 400)
    assert set(report["gap_by_stage"]) == {"1_align", "2_instruct"}
    assert len(report["examples"]) == 4
    assert all(len(example["asked"]) == 2 for example in report["examples"])
    assert len(report["summary"]) == len(BARS)
    assert report["stages"][0]["documents"]["squares"]["used"] == 8
    assert report["stages"][0]["refused"] == [["squares", "x", "<torn>"]]

    html = (run / "report.html").read_text()
    checked = Checker(html)
    images = [attributes["src"] for tag, attributes in checked.tags if tag == "img"]
    assert len(images) == 4
    assert all(str(source).startswith("data:image/webp;base64,") for source in images)
    assert "not finished" in checked.words
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"https?://|@import|<script|<link", html)
    assert "CC0 <b>" in checked.words
    assert "<b>" not in html


def test_texts_from_outside_are_escaped() -> None:
    nasty = "<script>alert(1)</script> \"'& ünïcode 🦜 \u202e"
    report: dict[str, Any] = {
        "folder": nasty,
        "model": nasty,
        "figures": {"choice": {"reason": nasty}},
        "stages": [{"name": nasty, "recipe": nasty, "documents": {nasty: {"used": 1}}}],
        "examples": [{"key": nasty, "asked": [{"question": nasty, "truth": "x", "answer": nasty}]}],
        "data": [{"package": nasty, "licence": nasty}],
        "made": {"command": nasty, "machine": nasty},
    }
    html = page(report, {nasty: 'data:image/webp;base64,"><script>'})
    checked = Checker(html)
    assert "script" not in [tag for tag, _ in checked.tags]
    assert checked.words.count(nasty) >= 8


def test_a_report_of_nothing_is_still_a_page() -> None:
    checked = Checker(page({}, {}))
    assert checked.words.count("not measured") >= len(BARS)


def test_stages_are_read_in_order_with_torn_lines_left_out(run: Path) -> None:
    stages = read_stages(run)
    assert [stage.name for stage in stages] == ["1_align", "2_instruct", "3_later"]
    assert [stage.finished for stage in stages] == [True, True, False]
    assert len(stages[2].steps) == 1
    assert last_finished(stages).name == "2_instruct"
    assert str(original_model(stages)).endswith("llama")
    known = stages[0].to_json()
    assert known["tokens"] == 600
    assert known["tokens_per_second"] == pytest.approx(200)
    assert known["wait_share"] == pytest.approx(0.2)
    assert known["curve"][-1] == (600, 2.0)


def test_a_folder_without_stages_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reports.main([str(tmp_path)]) == 2
    assert "no stage was begun here" in capsys.readouterr().err
    assert reports.main([str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "1_align").mkdir()
    (tmp_path / "1_align" / "run.json").write_text("{}")
    assert reports.main([str(tmp_path)]) == 2
    assert "no stage is finished" in capsys.readouterr().err
    assert list(tmp_path.glob("report*")) == []


def test_missing_data_says_what_to_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reports.main([str(run), "--data", str(tmp_path / "none")]) == 2
    assert "scripts/quickstart.sh" in capsys.readouterr().err


def test_a_changed_text_is_refused(data_folder: Path) -> None:
    (data_folder / "heldout" / "text.txt").write_text("another text")
    with pytest.raises(ValueError, match="checksum"):
        HeldOutData.read(data_folder)


def test_a_figure_that_cannot_be_measured_gives_its_reason(run: Path, data_folder: Path) -> None:
    path = data_folder / "heldout" / "captions.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:5]))
    report, pictures = reports.evaluate(run, data_folder, examples=1, by_stage=False)
    assert "5 distinct captions" in report["figures"]["choice"]["reason"]
    assert "value" in report["figures"]["caption_gap"]
    assert any("not measured" in line for line in report["summary"])
    assert "5 distinct captions" in Checker(page(report, pictures)).words


def test_curves_take_any_numbers() -> None:
    for points in (
        [],
        [(1, 2.0)],
        [(1, 2.0), (2, 2.0)],
        [(i, 0.0) for i in range(5)],
        [(i, 1e6 if i == 3 else 1.0) for i in range(500)],
        [(i * 10**9, -1.0 * i) for i in range(9)],
    ):
        svg = loss_curve(points, "a <b> & c")
        Checker(svg)
        assert "nan" not in svg
        assert "inf" not in svg
        assert "a &lt;b&gt; &amp; c" in svg


def test_the_running_mean_starts_at_the_first_value() -> None:
    assert smoothed([4.0])[0] == pytest.approx(4.0)
    assert smoothed([2.0] * 9) == pytest.approx([2.0] * 9)
