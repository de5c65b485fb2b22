"""Promises 3, 4, 7 and 10 on real DeepSpeed ranks: one launch per number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from data_packing.account import account
from data_packing.document import Document, DocumentError, Image
from data_packing.ledger import Ledger
from data_packing.pack import collate
from data_packing.planned import PlannedPack, micro_packs
from data_packing.sample import IGNORED
from mllm import recipe_parts
from mllm.models.assemble import assemble, load
from mllm.recipe import load as load_recipe
from mllm.training import build
from mllm.training.checkpoint_index import read_state
from mllm.training.run_folder import read_lines
from tests.training import tiny
from tests.training.conftest import BOTH, Runs, same_bits

CLOSE = 2e-5
COMBINATIONS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3)]
COMBINATIONS += [("bf16", 1), ("bf16", 2), ("bf16", 3)]


def test_the_loss_curve_does_not_depend_on_ranks_accumulation_or_zero(
    one: Runs, two: Runs, four: Runs
) -> None:
    reference, norms = one.losses("curve-0"), one.gradient_norms("curve-0")
    assert len(reference) == 20
    assert reference[-1] < reference[0] - 0.3
    assert min(norms) > 0.0
    others = {"1x4, ZeRO 3": (one, "curve-3")}
    for runs, name in ((two, "2x2"), (four, "4x1")):
        others |= {f"{name}, ZeRO {zero}": (runs, f"curve-{zero}") for zero in (1, 2, 3)}
    for name, (runs, run) in others.items():
        assert runs.losses(run) == pytest.approx(reference, rel=1e-6), name
        # AdamW's losses would not show gradients that are all too large by one factor
        assert runs.gradient_norms(run) == pytest.approx(norms, rel=1e-4), name
    assert two.losses("fp32-0") == pytest.approx(one.losses("fp32-0"), rel=1e-6)


def test_weighted_losses_do_not_depend_on_ranks_or_accumulation(
    one: Runs, two: Runs, four: Runs
) -> None:
    reference, norms = one.losses("weighted"), one.gradient_norms("weighted")
    assert len(reference) == 10
    for runs in (two, four):
        assert runs.losses("weighted") == pytest.approx(reference, abs=CLOSE)
        assert runs.gradient_norms("weighted") == pytest.approx(norms, rel=1e-3)


def test_every_objective_is_divided_by_the_weights_of_its_own_documents(
    two: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_parts, "OBJECTIVE_NAMES", BOTH)
    record = read_lines(two.folder("weighted").metrics)[0]
    assert record["refused"] == 1, "the first step has lost no document"
    found = first_step(two.path / "weighted.yaml")
    assert record["learned"] == sum(learned for _, learned, _, _ in found)
    assert {source for source, *_ in found} == {0, 1, 2}

    def mean(number: int, off: int, power: float) -> float:
        """One objective's loss without one source, tokens counting n**-power."""
        of = [document for document in found if document[0] != off]
        whole = sum(document[2 + number] * document[1] ** -power for document in of)
        return whole / sum(document[1] ** (1 - power) for document in of)

    captions, texts, broken = 0, 1, 2
    expected = mean(0, broken, 0.5) + mean(1, texts, 0.5)
    assert record["loss"] == pytest.approx(expected, abs=2 * CLOSE)
    others = [mean(0, broken, 0.0) + mean(1, texts, 0.0), mean(0, -1, 0.5) + mean(1, -1, 0.5)]
    others.append(mean(0, captions, 0.5) + mean(1, texts, 0.5))
    assert all(abs(expected - other) > 50 * CLOSE for other in others), "it makes no difference"


def test_an_objective_may_have_nothing_to_learn_in_a_step(two: Runs) -> None:
    losses = two.losses("turns")
    assert len(losses) == 48
    refused = [record["refused"] for record in read_lines(two.folder("turns").metrics)]
    assert sum(refused) == 1
    assert losses[refused.index(1)] == 0, "a step whose only document is refused"
    assert all(loss > 0 for loss, lost in zip(losses, refused, strict=True) if not lost)


def first_step(file: Path) -> list[tuple[int, int, float, float]]:
    """Source, learned tokens and both sums of every document of a run's first step.

    One document at a time, with the weights that the run began with.
    """
    recipe = load_recipe(file)
    torch.manual_seed(recipe.run.seed)
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    plan = build.plan(recipe, model, processor, 0)
    found = []
    for entry in (entry for pack in next(plan.steps()).packs for entry in pack.entries):
        assert entry.whole
        try:
            sample = processor.encode(plan.first.indexes[entry.source].read(entry.document))
        except DocumentError:
            continue
        pack = collate([sample], 0)
        with torch.no_grad():
            hidden = model.hidden_states(
                pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
            )
            logits = model.lm_head(hidden)[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], pack.labels[1:], reduction="sum")
        ones = ((hidden[0] - 1) ** 2).mean(1)[pack.labels != IGNORED].sum()
        found.append((entry.source, pack.learned, float(loss), float(ones)))
    return found


def test_bf16_keeps_fp32_masters_and_stays_near_fp32(one: Runs, two: Runs) -> None:
    reference = one.losses("fp32-0")
    for name in ("bf16-1", "bf16-2", "bf16-3"):
        assert two.losses(name) == pytest.approx(reference, abs=0.1), name
        state = two.state(name)
        weights = two.weights(name)
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        key = "language_model.model.layers.0.mlp.up_proj.weight"
        master = state[f"model.{key}/master"]
        assert weights[key].dtype == torch.bfloat16
        assert torch.equal(weights[key], master.bfloat16())
        assert not torch.equal(weights[key].float(), master), "masters are only rounded copies"
    assert one.losses("bf16-1") == pytest.approx(reference, abs=0.1)


@pytest.mark.parametrize(("precision", "zero"), COMBINATIONS)
def test_a_resumed_run_is_bit_identical(two: Runs, precision: str, zero: int) -> None:
    same_bits(two, f"{precision}-{zero}", f"{precision}-{zero}-again")


def test_a_resumed_run_with_adapters_dropout_ridge_and_workers_is_bit_identical(
    two: Runs,
) -> None:
    same_bits(two, "lora", "lora-again")


def test_a_run_over_several_windows_goes_on_inside_a_later_one(one: Runs, two: Runs) -> None:
    same_bits(two, "windows", "windows-again")
    assert one.losses("windows") == pytest.approx(two.losses("windows"), abs=CLOSE)
    assert len(two.losses("windows")) == 10
    recipe = load_recipe(two.path / "windows.yaml")
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    plan = build.plan(recipe, model, processor, 0)
    after = [step.after for step in plan.steps()]
    assert plan.corpus.windows == 2
    assert after[5].visit > 0
    assert after[-1].visit > 1, "the run should come back to a window"
    ledger = Ledger.load(two.folder("windows").ledger)
    assert ledger.counts == account(plan, plan.end).ledger.counts
    assert sum(counts.used for counts in ledger.counts.values()) == 72


def test_dropout_is_the_same_on_any_number_of_ranks(one: Runs, two: Runs) -> None:
    assert two.losses("lora") == pytest.approx(one.losses("lora"), abs=CLOSE)


def test_a_run_goes_on_with_other_ranks_and_another_zero_stage(
    one: Runs, two: Runs, four: Runs
) -> None:
    """With a frozen part, adapters and three learning rates."""
    assert len(two.losses("hop")) == 9
    reference, whole = two.state("parts"), two.losses("parts")
    batches = [record["learned"] for record in read_lines(two.folder("parts").metrics)]
    groups = {group["name"]: group for group in two.groups("parts")}
    peaks = {"encoder.vision.encoder.layers.0": 1e-3, "connector": 1e-2, "language_model": 5e-3}
    assert {name: group["peak_lr"] for name, group in groups.items()} == {
        name: peaks[name.removesuffix("/no_decay")] for name in groups
    }
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.1}
    for runs in (one, four):
        records = read_lines(runs.folder("hop").metrics)
        assert [record["learned"] for record in records] == batches
        assert runs.losses("hop") == pytest.approx(whole, abs=1e-5)
        assert {group["name"]: group for group in runs.groups("hop")} == groups
        state = runs.state("hop")
        assert state.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(state[name], tensor, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(("name", "epochs"), [("text", 1), ("crossed", 2)])
def test_a_rank_without_images_does_not_hang_zero_3(two: Runs, name: str, epochs: int) -> None:
    recipe = load_recipe(two.path / f"{name}.yaml")
    model, processor, _ = build.model(recipe.model, recipe, torch.float32)
    plan = build.plan(recipe, model, processor, 0)
    text_source = 1

    def images(pack: PlannedPack | None) -> bool:
        return pack is not None and any(e.source != text_source for e in pack.entries)

    alone = 0
    for step in plan.steps():
        pairs = zip(micro_packs(step, 0, 2), micro_packs(step, 1, 2), strict=True)
        alone += sum(images(a) != images(b) for a, b in pairs)
    assert alone > 5, "the data gives no rank a pack without images beside one with"
    assert len(two.losses(name)) == plan.total_steps == 18 * epochs


def test_gated_cross_attention_learns_alike_on_any_number_of_ranks(one: Runs, two: Runs) -> None:
    assert two.losses("crossed") == pytest.approx(one.losses("crossed"), abs=CLOSE)
    first = slice(18)  # the second epoch's gradients are so small that rounding shows
    norms = one.gradient_norms("crossed")[first]
    assert two.gradient_norms("crossed")[first] == pytest.approx(norms, rel=1e-3)
    state, weights = two.state("crossed"), two.weights("crossed")
    gates = [name for name in weights if name.endswith("_gate")]
    assert len(gates) == 4
    assert all(weights[name].abs().max() > 1e-3 for name in gates)
    learned = {name.split(".")[1] for name in state if name.endswith("/master")}
    assert learned == {"connector", "fusion", "language_model"}
    assert type(load(two.path / "crossed")[0].fusion).__name__ == "CrossAttention"


def test_a_document_that_fails_at_decode_is_left_out_and_named(two: Runs) -> None:
    folder = two.folder("broken")
    records = read_lines(folder.metrics)
    assert sum(record["refused"] for record in records) == 1
    assert all(0 < record["loss"] < 10 for record in records)
    (refused,) = read_lines(folder.refused)
    assert refused["key"] == tiny.BROKEN_KEY
    assert records[refused["step"] - 1]["refused"] == 1
    ledger = Ledger.load(folder.ledger)
    assert [refusal.key for refusal in ledger.refused] == [tiny.BROKEN_KEY]
    (counts,) = ledger.counts.values()
    assert (counts.read, counts.used, counts.refused) == (24, 23, 1)


def test_another_recipe_in_the_same_folder_is_refused(two: Runs) -> None:
    message = (two.path / "changed.error-0").read_text()
    assert "run.seed: was 5, is now 6" in message
    assert "another run.output or delete" in message
    assert len(two.losses("changed")) == 2


def test_frozen_modules_stay_and_have_no_state(home: Path, two: Runs) -> None:
    weights, state = two.weights("fp32-3"), two.state("fp32-3")
    original = load_file(home / "clip" / "model.safetensors")
    kept = 0
    for name, tensor in original.items():
        mine = weights.get("encoder.vision." + name)
        if mine is not None:
            kept += 1
            assert torch.equal(mine, tensor), name
    assert kept > 5
    assert not [name for name in state if "encoder" in name]
    assert [name for name in state if "connector" in name]


def test_adapters_train_alone_and_are_merged_and_kept(home: Path, two: Runs) -> None:
    state, weights = two.state("lora"), two.weights("lora")
    language = [n for n in state if ".language_model." in n]
    assert language
    assert all(".lora_" in name for name in language)
    moved = [n for n in language if n.endswith("/master") and ".lora_B." in n]
    assert all(state[name].abs().max() > 0 for name in moved)
    assert not [name for name in weights if "lora" in name or "base_layer" in name]

    key = "model.layers.1.self_attn.q_proj"
    base = load_file(home / "llm" / "model.safetensors")[f"{key}.weight"]
    a = state[f"model.language_model.{key}.lora_A.default.weight/master"]
    b = state[f"model.language_model.{key}.lora_B.default.weight/master"]
    expected = base + 2.0 * (b @ a)  # alpha = 2 x rank
    torch.testing.assert_close(weights[f"language_model.{key}.weight"], expected)

    adapter = load_file(two.path / "lora" / "lora" / "adapter_model.safetensors")
    assert torch.equal(adapter[f"base_model.model.{key}.lora_A.weight"], a)
    config = json.loads((two.path / "lora" / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["base_model_name_or_path"] == str(home / "llm")


def test_a_stage_goes_on_from_merged_adapters(two: Runs) -> None:
    before, after = two.weights("lora"), two.weights("after-lora")
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"connector"}
    assert two.losses("after-lora")[0] < two.losses("lora")[0]
    begun = two.folder("after-lora").begun()
    assert begun is not None
    assert str(two.path / "lora") in json.dumps(begun["parent"])


def test_what_a_stage_saved_makes_the_ids_it_was_trained_on(two: Runs) -> None:
    """Promise 8, the last of its three: after export."""
    recipe = load_recipe(two.path / "fp32-3.yaml")
    _, trained = assemble(recipe.model)
    saved = AutoProcessor.from_pretrained(two.path / "fp32-3")
    image = Image.from_bytes(tiny.picture("red", 0))
    talk = Document.conversation([("user", [image, "a square"]), ("assistant", "red")])
    for document in (*tiny.captions(3), *tiny.texts(2), talk):
        expected, got = trained.encode(document), saved.encode(document)
        assert expected.input_ids.tolist() == got.input_ids.tolist()
        assert expected.labels.tolist() == got.labels.tolist()


def test_peft_loads_the_adapters_to_the_merged_model(home: Path, two: Runs) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged, processor = load(two.path / "lora", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(home / "llm", dtype=torch.float32)
    base.resize_token_embeddings(merged.get_input_embeddings().num_embeddings)
    adapted = PeftModel.from_pretrained(base, two.path / "lora" / "lora").eval()
    ids = torch.tensor([processor.tokenizer("a red square")["input_ids"]])
    with torch.no_grad():
        theirs = adapted(input_ids=ids).logits[..., :100]
        ours = merged(input_ids=ids).logits[..., :100]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_finished_folder_says_what_it_is(two: Runs) -> None:
    folder = two.folder("fp32-2")
    finished, begun = folder.finished(), folder.begun()
    assert finished is not None
    assert begun is not None
    assert finished["steps"] == begun["steps"] == 5
    assert finished["plan"] == begun["plan"]
    assert (begun["ranks"], begun["zero"], begun["precision"]) == (2, 2, "fp32")
    homes = sorted(folder.state.glob("step-*"))
    assert len(homes) == 1
    state = read_state(homes[0])
    assert state.step == 5
    parameter = "model.language_model.model.norm.weight"
    assert state.groups[parameter] == "language_model/no_decay"
    load(folder.path)
