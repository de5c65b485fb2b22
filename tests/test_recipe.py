"""Recipes: what is read, and every refusal with its place."""

from __future__ import annotations

import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from data_packing.loss_weights import RULES
from mllm import recipe_parts
from mllm.models.connectors import CONNECTORS
from mllm.models.fusion import FUSIONS
from mllm.objectives import OBJECTIVES
from mllm.parts.fusions import WITH_WEIGHTS
from mllm.recipe import DataSection, RecipeError, load, load_all
from mllm.recipe_parts import (
    CONNECTOR_LAST_LINEAR,
    OBJECTIVE_NAMES,
)
from mllm.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
GOOD = """\
model:
  encoder: {name: clip, path: models/clip}
  connector: {name: average_pool, visual_tokens: 16, init: ridge}
  language_model: {path: models/llm}
train:
  encoder: frozen
  connector: {lr: 1e-3}
  language_model: {lr: 2.0e-5, lora: {rank: 8, alpha: 16}}
data:
  sources:
    - {path: "a-*.tar"}
    - {path: "b-*.tar", weight: 2}
  packing: {tokens: 1024}
optimizer: {weight_decay: 0.01, warmup: 0.03, schedule: cosine}
run: {epochs: 1, tokens_per_step: 4096}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that is right."""
    folder = tmp_path / "staged"
    folder.mkdir()
    file = folder / "1_align.yaml"
    file.write_text(GOOD)
    return file


def test_a_recipe_is_read_and_completed(recipe: Path) -> None:
    read = load(recipe)
    assert read.train["encoder"].frozen
    assert read.train["connector"].lr == 1e-3
    assert read.train["language_model"].lora is not None
    assert read.train["language_model"].lora.rank == 8
    assert read.data.sources[1].weight == 2.0
    assert read.data.packing.across_documents is False
    assert read.objectives == ("language_modeling",)
    assert read.run.precision == "auto"
    assert read.output == Path("outputs/staged/1_align")


def test_packs_are_balanced_unless_the_recipe_says_no(recipe: Path) -> None:
    def balance(*overrides: str) -> dict[str, object]:
        chosen = load(recipe, [f"data.packing.balance={value}" for value in overrides])
        return chosen.data.packing.balance.model_dump(exclude_none=True)

    assert balance() == balance("auto") == {"off": False}
    assert balance("false") == balance("off") == {"off": True}
    assert balance("{pairs: 1e-5, patches: 0.1}") == {"off": False, "pairs": 1e-5, "patches": 0.1}


def test_options_of_parts_are_passed_on(recipe: Path) -> None:
    read = load(recipe, ["model.encoder.layer=-3", "model.connector.hidden=64"])
    assert read.model.encoder is not None
    assert read.model.encoder.options == {"layer": -3}
    assert read.model.connector is not None
    assert read.model.connector.options == {"hidden": 64}


def test_bounds_of_images_may_change_beside_from(recipe: Path) -> None:
    start = "model={from: outputs/x, encoder: {max_pixels: 400}}"
    encoder = load(recipe, [start]).model.encoder
    assert encoder is not None
    assert (encoder.name, encoder.options) == (None, {"max_pixels": 400})
    with pytest.raises(ValueError, match="already brings the encoder"):
        load(recipe, ["model={from: outputs/x, encoder: {max_pixels: 400, layer: -2}}"])
    with pytest.raises(ValueError, match="max_pixels must be a whole number greater than 0"):
        load(recipe, ["model={from: outputs/x, encoder: {max_pixels: -400}}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.warmup=0.1", ("optimizer", "warmup", 0.1)),
        ("run.tokens_per_step=1_048_576", ("run", "tokens_per_step", 1048576)),
        ("run.tokens_per_step=1.024e6", ("run", "tokens_per_step", 1024000)),
        ("optimizer.clip=1", ("optimizer", "clip", 1.0)),
        ("optimizer.lr=5.0e-5", ("optimizer", "lr", 5e-5)),
        ("optimizer.lr=3e-4", ("optimizer", "lr", 3e-4)),
        ("run.output=some/where", ("run", "output", "some/where")),
    ],
)
def test_overrides_are_read_as_yaml(
    recipe: Path, override: str, expected: tuple[str, str, object]
) -> None:
    section, key, value = expected
    assert getattr(getattr(load(recipe, [override]), section), key) == value


def test_a_source_may_choose_a_text_and_is_another_run_with_it(recipe: Path) -> None:
    plain, chosen = load(recipe), load(recipe, ["data.sources.1.text=alt"])
    assert [source.text for source in chosen.data.sources] == [None, "alt"]
    assert chosen.hash() != plain.hash()
    assert not any("text" in key for key in plain.identity())  # old runs can still be resumed


def test_overrides_reach_lists_and_dotted_modules(recipe: Path) -> None:
    read = load(
        recipe,
        [
            "data.sources.1.weight=0.5",
            "train.language_model.lora.rank=2",
            "train.language_model.model.norm.lr=1e-5",
            "train.encoder.vision=frozen",
        ],
    )
    assert read.data.sources[1].weight == 0.5
    how = read.train["language_model"].lora
    assert how is not None
    assert (how.rank, how.alpha) == (2, 16)
    assert read.train["language_model.model.norm"].lr == 1e-5
    assert read.train["encoder.vision"].frozen


REFUSALS = {
    "unknown section": (["optimiser={}"], "unknown key 'optimiser'; did you mean 'optimizer'?"),
    "unknown key": (
        ["optimizer.warmpu=0.1"],
        "unknown key 'optimizer.warmpu'; did you mean 'warmup'?",
    ),
    "unknown key in a list": (
        ["data.sources.0.wieght=2"],
        "unknown key 'data.sources.0.wieght'; did you mean 'weight'?",
    ),
    "unknown key of a module": (
        ["train.connector={learning_rate: 1}"],
        "unknown key 'train.connector.learning_rate'",
    ),
    "unknown setting of a module": (
        ["train.connector.lrr=1e-3"],
        "unknown key 'train.connector.lrr'; did you mean 'lr'?",
    ),
    "unknown key of lora": (
        ["train.language_model.lora.rnak=3"],
        "unknown key 'train.language_model.lora.rnak'; did you mean 'rank'?",
    ),
    "wrong type": (["run.tokens_per_step=many"], "run.tokens_per_step: expected a valid integer"),
    "not a number": (["optimizer.lr=fast"], "optimizer.lr: expected a valid number"),
    "negative rate": (["train.connector.lr=-1"], "train.connector.lr: expected greater than 0"),
    "warmup of everything": (["optimizer.warmup=1.5"], "optimizer.warmup: expected less than 1"),
    "wrong word": (
        ["optimizer.schedule=cosin"],
        "optimizer.schedule: expected 'cosine', 'linear', 'constant' or 'wsd', got 'cosin'; did "
        "you mean 'cosine'?",
    ),
    "wrong optimizer": (["optimizer.name=adam"], "did you mean 'adamw'?"),
    "wrong zero": (["run.zero=4"], "run.zero: expected 'auto', 0, 1, 2 or 3, got 4"),
    "section is no mapping": (["run=fast"], "run: expected a mapping with the keys"),
    "train value": (["train.encoder=froze"], "expected frozen or {lr: …, lora: {…}}, got 'froze'"),
    "missing lora rank": (
        ["train.language_model.lora={alpha: 4}"],
        "train.language_model.lora.rank is missing",
    ),
    "no sources": (["data.sources=[]"], "data.sources is empty"),
    "no objectives": (["objectives=[]"], "objectives is empty"),
    "unknown objective": (
        ["objectives=[language_modelling]"],
        "unknown objective 'language_modelling'; did you mean 'language_modeling'?",
    ),
    "neither tokens nor epochs": (["run.epochs=null"], "give run.tokens or run.epochs"),
    "tokens and epochs": (["run.tokens=1000"], "give run.tokens or run.epochs, not both"),
    "a step smaller than a pack": (
        ["run.tokens_per_step=512"],
        "run.tokens_per_step (512) is smaller than one pack (data.packing.tokens = 1024)",
    ),
    "no name of the encoder": (["model.encoder.name=null"], "give model.encoder.name"),
    "from and encoder": (
        ["model.from=outputs/x"],
        "model.from already brings the encoder; remove model.encoder or model.from",
    ),
    "no encoder": (["model.encoder=null"], "give model.encoder, or model.from a folder"),
    "no connector name": (["model.connector={visual_tokens: 4}"], "give model.connector.name"),
    "nothing trains": (
        ["train.connector=frozen", "train.language_model=frozen"],
        "nothing would be trained",
    ),
    "frozen with a rate": (
        ["train.encoder={frozen: true, lr: 1e-3}"],
        "train.encoder is frozen and has a learning rate",
    ),
    "no rate": (
        ["train.connector={}"],
        "train.connector has no learning rate; give train.connector.lr or optimizer.lr",
    ),
    "unknown module": (
        ["train.conector.lr=1e-3"],
        "train: unknown module 'conector'; did you mean 'connector'?",
    ),
    "ridge under adapters": (
        ["train.connector.lora={rank: 4}"],
        "which must be trained, and train.connector has adapters over it",
    ),
    "two kinds of adapters": (
        ["train.language_model.qlora={rank: 4}"],
        "train.language_model has lora and qlora; choose one",
    ),
    "unknown key of qlora": (
        ["train.language_model={lr: 1e-4, qlora: {rnak: 4}}"],
        "unknown key 'train.language_model.qlora.rnak'; did you mean 'rank'?",
    ),
    "frozen with adapters": (
        ["train.encoder={frozen: true, dora: {rank: 2}}"],
        "train.encoder is frozen and has dora; choose one",
    ),
    "frozen with a decay by layer": (
        ["train.encoder={frozen: true, layer_decay: 0.9}"],
        "train.encoder is frozen and has layer_decay; choose one",
    ),
    "a decay that grows": (
        ["train.connector={lr: 1e-3, layer_decay: 1.1}"],
        "train.connector.layer_decay: expected less than or equal to 1",
    ),
    "a fall without wsd": (
        ["optimizer.decay=0.2"],
        "optimizer.decay is how much of a run falls under schedule wsd; cosine has no such part",
    ),
    "all warm-up and fall": (
        ["optimizer={schedule: wsd, decay: 0.8, warmup: 0.3}"],
        "warmup and optimizer.decay are together more than the run",
    ),
    "muon under ZeRO-2": (
        ["optimizer.name=muon", "run.zero=2"],
        "optimizer.name: muon under run.zero: 2 in bf16: DeepSpeed clips Muon's steps there",
    ),
    "muon in fp32 under ZeRO-1": (
        ["optimizer.name=muon", "run.zero=1", "run.precision=fp32"],
        "use zero: 0 with precision: fp32 or zero: 1 with bf16",
    ),
    "misspelt optimizer": (["optimizer.name=muno"], "did you mean 'muon'?"),
    "bf16 without masters": (
        ["run.zero=0", "run.precision=bf16"],
        "run.zero: 0 keeps no fp32 master weights for bf16",
    ),
    "betas": (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas must lie in [0, 1)"),
    "override without value": (["optimizer.warmup"], "expected key=value"),
    "override beside a list": (
        ["data.sources.2.weight=1"],
        "data.sources is a list of 2; expected a position from 0 to 1, got '2'",
    ),
    "override by name in a list": (["data.sources.path=x"], "expected a position from 0 to 1"),
    "a step of two and a half packs": (
        ["run.tokens_per_step=2560"],
        "run.tokens_per_step (2560) is no multiple of a pack (data.packing.tokens = 1024); the "
        "nearest are 2048 and 3072",
    ),
    "unknown encoder": (["model.encoder.name=sigllip"], "unknown encoder 'sigllip'; did you mean"),
    "unknown connector": (
        ["model.connector.name=avg_pool"],
        "unknown connector 'avg_pool'; did you mean 'average_pool'?",
    ),
    "unknown option of the connector": (
        ["model.connector.hiden=3"],
        "unknown option 'hiden' of the connector average_pool; did you mean 'hidden'?",
    ),
    "unknown option of a loaded connector": (
        ["model={from: outputs/x, connector: {visual_token: 4}}"],
        "unknown option 'visual_token' of the connector; did you mean 'visual_tokens'?",
    ),
    "option of another connector": (
        ["model.connector.name=mlp"],
        "unknown option 'visual_tokens' of the connector mlp",
    ),
    "unknown option of the encoder": (
        ["model.encoder.layr=-1"],
        "unknown option 'layr' of the encoder clip; did you mean 'layer'?",
    ),
    "half a layer": (
        ["model.encoder.layer=1.5"],
        "layer must be a whole number below 0, got 1.5",
    ),
    "no square": (
        ["model.connector.visual_tokens=15"],
        "must be a square number, got 15; the nearest are 9 and 16",
    ),
    "no square for convolutions": (
        ["model.connector={name: c_abstractor, visual_tokens: 50}"],
        "must be a square number, got 50; the nearest are 49 and 64",
    ),
    "no layers": (
        ["model.connector={name: resampler, visual_tokens: 50, depth: 0}"],
        "model.connector.depth must be a whole number greater than 0, got 0",
    ),
    "a factor in words": (
        ["model.connector={name: pixel_shuffle, factor: two}"],
        "model.connector.factor must be a whole number greater than 0, got 'two'",
    ),
    "a path by number": (
        ["model.connector={name: q_former, path: 3}"],
        "model.connector.path must be a folder or hub id, got 3",
    ),
    "queries that read text, by number": (
        ["model.connector={name: q_former, text: 1}"],
        "model.connector.text must be true or false, got 1",
    ),
    "no visual tokens": (
        ["model.connector.visual_tokens=null"],
        "model.connector.visual_tokens is missing",
    ),
    "half a class token": (
        ["model.encoder={name: dinov2, path: x, class_token: 1}"],
        "model.encoder.class_token must be true or false, got 1",
    ),
    "class token of CLIP": (["model.encoder.class_token=true"], "unknown option 'class_token'"),
    "pair with a path": (
        ["model.encoder={name: pair, path: x, first: {name: clip, path: y}}"],
        "model.encoder.path: a pair has none; its first and second have",
    ),
    "half a pair": (
        ["model.encoder={name: pair, first: {name: clip, path: y}}"],
        "give model.encoder.second: {name: …, path: …}",
    ),
    "pair of a pair": (
        ["model.encoder={name: pair, first: {name: pair}, second: clip}"],
        "model.encoder.first: a pair of pairs is not supported",
    ),
    "part without a path": (
        ["model.encoder={name: pair, first: {name: clip}, second: {name: dinov2, path: y}}"],
        "model.encoder.first.path is missing",
    ),
    "part with a wrong option": (
        ["model.encoder={name: pair, first: {name: clip, path: x, layr: -1}}"],
        "unknown option 'layr' of the encoder clip; did you mean 'layer'?",
    ),
    "part with a rule": (
        ["model.encoder={name: pair, first: {name: clip, path: x, resize: pad}}"],
        "model.encoder.first: both see one view of an image; give model.encoder.resize",
    ),
    "unknown part": (
        ["model.encoder={name: pair, first: {name: sigllip, path: x}}"],
        "unknown encoder 'sigllip'; did you mean 'siglip'?",
    ),
    "tiles of no tiling": (
        ["model.images={tiles: 3, regions: feature}"],
        "unknown option 'tiles' of the images without a tiling; Valid: clip_tokens, regions",
    ),
    "a region by another name": (
        ["model.images={tiling: dynamic, regions: decimal}"],
        "model.images.regions must be decimals | thousandths | feature, got 'decimal'; did you "
        "mean 'decimals'?",
    ),
    "no encoder path": (["model.encoder.path=null"], "model.encoder.path is missing"),
    "an objective twice": (
        ["objectives=[language_modeling, language_modeling]"],
        "the objective 'language_modeling' is given twice",
    ),
    "infinite rate": (["optimizer.lr=.inf"], "optimizer.lr: expected a finite number"),
    "no number": (["data.sources.0.weight=.nan"], "data.sources.0.weight: expected a finite"),
    "no number in betas": (["optimizer.betas=[.nan, 0.9]"], "optimizer.betas.0: expected a finite"),
    "infinite whole number": (["run.seed=.inf"], "run.seed: expected a valid integer"),
    "endless weight": (["data.sources.0.weight=1e300"], "less than or equal to"),
    "a text without a name": (
        ["data.sources.0.text=''"],
        "data.sources.0.text: String should have at least 1 character",
    ),
    "a text by number": (["data.sources.0.text=1"], "data.sources.0.text: expected a valid string"),
    "endless epochs": (["run.epochs=99999999999999999999"], "less than or equal to 100000"),
    "endless step": (["run.tokens_per_step=1e30"], "less than or equal to"),
    "yes for a whole number": (["data.workers=true"], "data.workers: expected a valid integer"),
    "yes for a number": (["optimizer.clip=true"], "optimizer.clip: expected a valid number"),
    "yes for zero": (["run.zero=true"], "run.zero: expected a choice that is not true"),
    "quoted whole number": (["run.seed='7'"], "run.seed: expected a valid integer, got '7'"),
    "ridge on a frozen connector": (
        ["train.connector=frozen"],
        "model.connector.init: ridge solves connector.second, which must be trained, and "
        "train.connector is frozen",
    ),
    "ridge on a frozen layer": (
        ["train.connector.second=frozen"],
        "train.connector.second is frozen: a resumed run would lose the solution",
    ),
    "ridge on a layer nobody names": (
        ["train={connector.first: {lr: 1e-3}}"],
        "and train does not name it",
    ),
    "half a pack of documents": (["data.packing.documents=0"], "data.packing.documents"),
    "balance by a word": (
        ["data.packing.balance=evenly"],
        "data.packing.balance: expected auto, false or {tokens: …, pairs: …, patches: …}",
    ),
    "balance as yes": (["data.packing.balance=true"], "expected auto, false or"),
    "balance by another name": (
        ["data.packing.balance={patch: 0.1}"],
        "unknown key 'data.packing.balance.patch'; did you mean 'patches'",
    ),
    "a rule for loss weights that is not there": (
        ["data.loss_weights=square"],
        "data.loss_weights: expected 'token', 'sample' or 'sqrt', got 'square'; did you mean "
        "'sqrt'?",
    ),
    "an unknown objective of a source": (
        ["data.sources.1.objectives=[language_model]"],
        "data.sources.1.objectives: unknown objective 'language_model'; did you mean "
        "'language_modeling'?",
    ),
    "a source for nothing": (
        ["data.sources.1.objectives=[]"],
        "data.sources.1.objectives is empty: leave it out for all; valid: language_modeling",
    ),
    "an objective of a source twice": (
        ["data.sources.0.objectives=[language_modeling, language_modeling]"],
        "data.sources.0.objectives: the objective 'language_modeling' is given twice",
    ),
    "objectives of a source by a word": (
        ["data.sources.0.objectives=language_modeling"],
        "data.sources.0.objectives: expected a valid tuple, got 'language_modeling'",
    ),
    "packs for nothing": (["data.packing.balance={tokens: 0}"], "data.packing.balance.tokens"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_what_and_where(recipe: Path, case: str) -> None:
    overrides, expected = REFUSALS[case]
    with pytest.raises(RecipeError) as refusal:
        load(recipe, overrides)
    message = str(refusal.value)
    assert expected in message
    assert "command line" in message or f"{recipe}:" in message


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("warmup: 0.03", "warmpu: 0.03", 14, "unknown key 'optimizer.warmpu'"),
        ("weight: 2", "weight: heavy", 12, "data.sources.1.weight: expected a valid number"),
        ("tokens: 1024", "tokens: 8192", 15, "is smaller than one pack"),
        ("  encoder: frozen\n", "  encodr: frozen\n", 6, "unknown module 'encodr'"),
        ("epochs: 1", "epochs: 1, epochs: 2", 15, "the key 'run.epochs' is given twice"),
        ("path: models/llm}", "path: models/llm", 5, "not valid YAML"),
        ("weight: 2", "weight: 2026-13-45", 12, "'2026-13-45' cannot be read"),
        ("weight: 2", "objectives: [lm]", 12, "data.sources.1.objectives: unknown objective 'lm'"),
        ("{lr: 1e-3}", "{lr: 1e-3, warmup: 1}", 7, "train.connector.warmup: expected less than 1"),
    ],
)
def test_a_refusal_names_the_line(
    recipe: Path, old: str, new: str, line: int, expected: str
) -> None:
    assert old in GOOD
    recipe.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as refusal:
        load(recipe)
    assert f"{recipe}:{line}: " in str(refusal.value)
    assert expected in str(refusal.value)


CROSS = GOOD.replace(", init: ridge", "").replace(
    "train:\n",
    "  fusion: {name: cross_attention, every: 2}\ntrain:\n  fusion: {lr: 1e-3}\n",
)


def test_a_fusion_is_a_part_with_its_own_learning_rate(recipe: Path) -> None:
    recipe.write_text(CROSS)
    read = load(recipe)
    assert read.model.fusion is not None
    assert (read.model.fusion.name, read.model.fusion.options) == ("cross_attention", {"every": 2})
    assert read.train["fusion"].lr == 1e-3
    assert load(recipe, ["model.images={tiling: dynamic, tiles: 4}"]).model.images is not None
    layered = load(
        recipe, ["model.fusion={name: deepstack, layers: [0, 2]}", "train.fusion=frozen"]
    )
    assert layered.model.fusion is not None
    assert layered.model.fusion.options == {"layers": [0, 2]}
    assert layered.hash() != read.hash()


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("name: cross_attention", "name: cros_attention", 5, "did you mean 'cross_attention'"),
        ("every: 2", "evry: 2", 5, "unknown option 'evry' of the fusion cross_attention"),
        ("every: 2", "every: 0", 5, "model.fusion.every must be a whole number greater than 0"),
        ("every: 2", "every: 2, layers: [1]", 5, "give every or layers, not both"),
        ("every: 2", "layers: [3, 1]", 5, "layers must be [0, 4, …], rising"),
        ("every: 2", "only_immediate: 1", 5, "only_immediate must be true or false"),
        ("  fusion: {lr: 1e-3}\n", "", 5, "give train.fusion a learning rate"),
        ("fusion: {lr: 1e-3}", "fusion: frozen", 5, "give train.fusion a learning rate"),
        (
            "fusion: {lr: 1e-3}",
            "fusion: {lr: 1e-3, lora: {rank: 2}}",
            7,
            "a new fusion learns in full: its gates start",
        ),
        ("cross_attention, every: 2", "in_sequence", 7, "in_sequence has nothing to learn"),
        ("train:", "  images: {regions: feature}\ntrain:", 6, "none for a region of it; write"),
        (
            "visual_tokens: 16",
            "visual_tokens: 16, init: ridge",
            3,
            "with cross_attention use init: random",
        ),
    ],
)
def test_a_fusion_that_cannot_be_is_refused(
    recipe: Path, old: str, new: str, line: int, expected: str
) -> None:
    assert old in CROSS
    recipe.write_text(CROSS.replace(old, new, 1))
    with pytest.raises(RecipeError) as refusal:
        load(recipe)
    assert f"{recipe}:{line}: " in str(refusal.value)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_saved_model_brings_its_fusion(recipe: Path) -> None:
    start = CROSS.index("  encoder: {")
    parts = CROSS[start : CROSS.index("  fusion: {name")]
    recipe.write_text(CROSS.replace(parts, "  from: out/1\n"))
    with pytest.raises(RecipeError, match=r"model\.from already brings the fusion"):
        load(recipe)


@pytest.mark.parametrize("text", ["model: &a [*a]", "[" * 3000 + "]" * 3000])
def test_a_recipe_without_end_is_refused(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    with pytest.raises(RecipeError, match="nested too deeply, or something contains itself"):
        load(recipe)


def test_the_tables_of_parts_are_those_of_the_registries() -> None:
    for name, kind in FUSIONS.items():
        with torch.device("meta"):
            fusion = kind({}, LlamaConfig(num_hidden_layers=4), LlamaConfig().hidden_size)
        assert bool(list(fusion.parameters())) == (name in WITH_WEIGHTS)
    assert set(CONNECTOR_LAST_LINEAR) == set(CONNECTORS)
    for name, layer in CONNECTOR_LAST_LINEAR.items():
        spec = {"name": name, "visual_tokens": 4} if "pool" in name else {}
        with torch.device("meta"):
            connector = CONNECTORS[name](spec, 3, 3)
        assert connector.get_submodule(layer) is connector.last_linear()


def test_a_source_may_be_for_some_objectives_only(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("language_modeling", "retrieval", "grounding")
    monkeypatch.setattr(recipe_parts, "OBJECTIVE_NAMES", names)
    both = "objectives=[retrieval, language_modeling]"
    assert load(recipe).uses == ((1,), (1,))
    assert load(recipe, [both]).uses == ((1, 1), (1, 1))
    chosen = load(recipe, [both, "data.sources.1.objectives=[language_modeling]"])
    assert chosen.uses == ((1, 1), (0, 1))
    assert chosen.hash() != load(recipe, [both]).hash()
    with pytest.raises(RecipeError) as refusal:
        load(recipe, [both, "data.sources.0.objectives=[retrieval, grounding]"])
    expected = (
        "data.sources.0.objectives: 'grounding' is not in the recipe's objectives; "
        "Valid: language_modeling, retrieval"
    )
    assert expected in str(refusal.value)


def test_the_names_of_objectives_and_weights_are_those_that_are_there() -> None:
    assert set(OBJECTIVE_NAMES) == set(OBJECTIVES)
    rules = DataSection.model_fields["loss_weights"].annotation
    assert set(typing.get_args(rules)) == set(RULES)


def test_reading_a_recipe_loads_no_torch(recipe: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'mllm'; from mllm.recipe import load; "
        f"load({str(recipe)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("old", "new", "meant"),
    [
        ("packing: {", "packin: {", "packing"),
        ("tokens: 1024", "tokns: 1024", "tokens"),
        ("rank: 8", "rnak: 8", "rank"),
        ("\nrun: {", "\nruns: {", "run"),
        ("visual_tokens: 16", "visual_token: 16", "visual_tokens"),
    ],
)
def test_a_misspelt_key_is_not_also_missing(recipe: Path, old: str, new: str, meant: str) -> None:
    recipe.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as refusal:
        load(recipe)
    (line,) = str(refusal.value).splitlines()
    assert f"did you mean {meant!r}?" in line


def test_a_missing_key_that_no_unknown_one_is_like_is_named_too(recipe: Path) -> None:
    recipe.write_text(GOOD.replace("packing: {", "unlike: {", 1))
    with pytest.raises(RecipeError) as refusal:
        load(recipe)
    assert "unknown key 'data.unlike'" in str(refusal.value)
    assert "data.packing is missing" in str(refusal.value)


def test_all_mistakes_are_named_at_once(recipe: Path) -> None:
    with pytest.raises(RecipeError) as refusal:
        load(recipe, ["optimizer.warmpu=1", "run.zero=9"])
    assert len(str(refusal.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "the recipe is empty"), ("- a\n- b\n", "a recipe is a mapping"), ("a: [", "valid YAML")],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=expected):
        load(file)


def test_a_missing_recipe_names_its_neighbours(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe; did you mean '1_align.yaml'"):
        load(recipe.with_name("1_aling.yaml"))


def test_a_folder_is_run_in_file_name_order(recipe: Path) -> None:
    for name in ("3_c.yaml", "2_b.yaml"):
        recipe.with_name(name).write_text(GOOD)
    files = [file.name for file, _ in load_all(recipe.parent)]
    assert files == ["1_align.yaml", "2_b.yaml", "3_c.yaml"]


def test_a_mistake_in_a_later_stage_is_seen_first(recipe: Path) -> None:
    recipe.with_name("2_b.yaml").write_text(GOOD.replace("epochs", "epoch"))
    with pytest.raises(RecipeError, match=r"2_b.yaml:15: unknown key 'run.epoch'"):
        load_all(recipe.parent)


def test_two_stages_cannot_share_an_output(recipe: Path) -> None:
    recipe.with_name("2_b.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"is also that of"):
        load_all(recipe.parent, ["run.output=here"])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe"):
        load_all(tmp_path)


def test_the_identity_is_what_decides_the_result(recipe: Path) -> None:
    plain = load(recipe)
    same = ["run.output=x", "run.checkpoint_every=7", "run.zero=3", "data.workers=4"]
    assert load(recipe, same).hash() == plain.hash()
    changes = ["run.seed=1", "optimizer.warmup=0.1", "model.encoder.layer=-1"]
    for change in (*changes, "data.loss_weights=sqrt"):
        assert load(recipe, [change]).hash() != plain.hash(), change


def test_the_recipe_in_a_folder_is_the_recipe(recipe: Path, tmp_path: Path) -> None:
    some = "data.sources.0.objectives=[language_modeling]"
    read = load(recipe, ["model.encoder.layer=-1", some])
    folder = RunFolder(tmp_path / "run")
    folder.begin(read, {"identity": read.identity()})
    assert load(folder.recipe) == read


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").rglob("*.yaml")), ids=str)
def test_the_recipes_that_ship_are_right(file: Path) -> None:
    load(file)
