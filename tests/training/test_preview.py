"""`mllm data preview`, with a model's own processor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from data_packing.account import account
from data_packing.document import Document, Text
from data_packing.sharding import write_shards
from mllm import cli
from mllm.models.template import Template
from mllm.recipe import load
from mllm.training import build
from mllm.training.preview import preview, spell
from tests.training import tiny


class Speller:
    """A processor as far as spelling goes: bytes are tokens."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
        self.tokenizer.add_tokens(["<image>"], special_tokens=True)
        self.template = Template(self.tokenizer, "<image>")

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


@pytest.mark.parametrize("text", ["cat", "naïve — 日本 🙂!", "a\ufffdb", " spaces  \n", "\ufffd"])
def test_tokens_are_spelled_and_together_are_the_text(text: str) -> None:
    speller = Speller()
    ids = speller.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids += [speller.tokenizer.eos_token_id]
    tokens = spell(speller, ids)
    assert len(tokens) == len(ids)
    assert "".join(token.text for token in tokens) == f"{text}<end>"
    assert [token.special for token in tokens] == [False] * (len(ids) - 1) + [True]
    assert all(token.text for token in tokens) == text.isascii()


def test_half_a_character_before_a_special_token_is_not_lost() -> None:
    speller = Speller()
    ids = speller.tokenizer("é", add_special_tokens=False)["input_ids"]
    end = speller.tokenizer.eos_token_id
    texts = [token.text for token in spell(speller, [ids[0], end, *ids])]
    assert texts == ["\ufffd", "<end>", "", "é"]


def test_a_recipe_becomes_a_page(home: Path, tmp_path: Path) -> None:
    values = tiny.recipe(
        home,
        tmp_path / "out",
        data__sources=[
            {"path": str(home / "data" / f"{name}-*.tar")} for name in ("captions", "broken")
        ],
    )
    file = tiny.write_recipe(tmp_path / "r.yaml", values)
    said: list[str] = []
    seen = preview(file, ["run.seed=3"], tmp_path / "p.html", 1000, 1, said.append)
    html = (tmp_path / "p.html").read_text()
    assert said[-1] == "reading 1,000 packs"
    assert "Preview of" in html
    assert html.count("<article") == 72 - 1
    assert f"{tiny.BROKEN_KEY}: image 1: truncated" in html
    assert "<i>r</i><i> e</i><i> d</i><i>  </i><i> s</i>" in html
    assert html.count("<i class=s>&lt;e&gt;</i>") == 72 - 1
    recipe = load(file, ["run.seed=3"])
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    assert seen.facts["hash"] == build.plan(recipe, model, processor, 0).hash
    assert not (tmp_path / "out").exists()


def test_a_stage_whose_parent_has_not_run_is_shown_with_the_parents_parts(
    home: Path, tmp_path: Path
) -> None:
    first = tiny.recipe(home, tmp_path / "out" / "1")
    second = tiny.recipe(home, tmp_path / "out" / "2")
    second["model"] = {"from": str(tmp_path / "out" / "1")}
    tiny.write_recipe(tmp_path / "staged" / "1.yaml", first)
    file = tiny.write_recipe(tmp_path / "staged" / "2.yaml", second)
    seen = preview(file, [], tmp_path / "p.html", 2, 1, lambda _: None)
    assert len(seen.packs) == 2


def test_a_stage_starts_from_a_saved_model(home: Path, tmp_path: Path) -> None:
    recipe = load(tiny.write_recipe(tmp_path / "1.yaml", tiny.recipe(home, tmp_path / "out")))
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    processor.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    values = tiny.recipe(home, tmp_path / "out2")
    values["model"] = {"from": str(tmp_path / "saved")}
    seen = preview(
        tiny.write_recipe(tmp_path / "2.yaml", values),
        [],
        tmp_path / "p.html",
        3,
        2,
        lambda _: None,
    )
    assert [pack.step for pack in seen.packs] == [2, 2, 2]


def test_the_commands_take_the_folder_of_a_model(home: Path, tmp_path: Path) -> None:
    recipe = load(tiny.write_recipe(tmp_path / "1.yaml", tiny.recipe(home, tmp_path / "out")))
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    processor.save_pretrained(tmp_path / "saved")
    model.config.save_pretrained(tmp_path / "saved")
    spoken = Document((Text("a <e> b"),), "odd", "spoken")
    write_shards([spoken, *tiny.captions(200)], tmp_path, "odd")

    def data(*arguments: object) -> Result:
        return CliRunner().invoke(cli.app, ["data", *map(str, arguments)])

    options = ("--model", tmp_path / "saved", "--workers", 2, "--json")
    linted = data("lint", tmp_path / "odd*.tar", "--tokens", 24, *options)
    kinds = json.loads(linted.stdout.splitlines()[-1])["kinds"]
    assert linted.exit_code == 1
    assert kinds["special token in text"] == 1
    long = sum(len(f"{d.parts[1].text}") + 4 + 1 > 24 for d in tiny.captions(200))  # type: ignore[union-attr]
    assert kinds["piece above a pack"] == long > 0
    counted = json.loads(data("info", tmp_path / "odd*.tar", *options).stdout)["all"]
    assert counted["refused"] == {"by the model: a text contains the special token …": 1}
    assert counted["spreads"]["tokens with images"]["least"] == len("red square ") + 1 + 4


def test_the_preview_command_writes_where_it_is_told(home: Path, tmp_path: Path) -> None:
    file = tiny.write_recipe(tmp_path / "1.yaml", tiny.recipe(home, tmp_path / "out"))
    out = tmp_path / "page.html"
    arguments = ["data", "preview", str(file), "run.seed=4", "--packs", "3", "--out"]
    done = CliRunner().invoke(cli.app, [*arguments, str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("3 packs of ")
    assert out.read_text().count('class="row"') == 3
    nowhere = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "none" / "page.html")])
    assert "a folder that is there" in str(nowhere.exception)


def test_a_source_listed_with_two_texts_is_counted_planned_and_shown_with_each(
    home: Path, tmp_path: Path
) -> None:
    named = []
    for number, document in enumerate(tiny.captions(40)):
        picture, text = document.parts
        assert isinstance(text, Text)
        variants = (("alt", "q" * 9), ("synthetic", "j" * 9))[: 1 + (number > 0)]
        named.append(replace(document, parts=(picture, replace(text, variants=variants))))
    pattern = str(write_shards(named, tmp_path / "data", "captions").paths[0])
    sources: list[dict[str, Any]] = [
        {"path": pattern, "text": "alt", "weight": 0.25},
        {"path": pattern, "text": "synthetic", "weight": 0.75},
        {"path": pattern},
    ]
    values = tiny.recipe(home, tmp_path / "out", data__sources=sources)
    file = tiny.write_recipe(tmp_path / "r.yaml", values)
    recipe = load(file)
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    processor.save_pretrained(tmp_path / "saved")
    model.config.save_pretrained(tmp_path / "saved")
    for text in ("alt", "synthetic"):
        options = ["--model", str(tmp_path / "saved"), "--text", text]
        counted = CliRunner().invoke(cli.app, ["data", "index", pattern, *options])
        assert f"with the text {text!r}" in counted.stdout
    assert "; 1 refused" in counted.stdout
    before = set((tmp_path / "data").iterdir())
    plan = build.plan(recipe, model, processor, 0)
    new = set((tmp_path / "data").iterdir()) - before
    assert len(new) == 1, "the variants were counted beforehand, the texts as written were not"
    ledger = account(plan, plan.end).ledger
    assert {name: counts.refused for name, counts in ledger.counts.items()} == {
        "captions:alt": 0,
        "captions:synthetic": 1,
        "captions": 0,
    }
    (refusal,) = ledger.refused
    assert refusal.reason == "no text variant 'synthetic'; it has 'alt'"
    assert (
        preview(file, [], tmp_path / "p.html", 1000, 1, lambda _: None).facts["hash"] == plan.hash
    )
    html = (tmp_path / "p.html").read_text()
    assert "captions:alt" in html
    shown = {letter: html.count(f"<i>{letter}</i>" + f"<i> {letter}</i>" * 8) for letter in "qj"}
    assert shown == {"q": 40 // 4, "j": 39 * 3 // 4}
