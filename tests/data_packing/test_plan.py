from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing_toys import captions, cost, dealt_order, index_of, page, plan_of, two_sources, uses

from data_packing import plan as plan_module
from data_packing.account import account
from data_packing.balance import WINDOW, PackCost
from data_packing.index import Index, build_index, source_names
from data_packing.ledger import Refusal
from data_packing.planned import Cursor, PlannedPack, PlannedStep, micro_packs

BALANCE = PackCost(tokens=1.0, pairs=0.01, patches=0.1)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> list[Index]:
    return two_sources(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BLOCK", 100)
    monkeypatch.setattr(plan_module, "STEPS", 1)


@pytest.mark.parametrize("balance", [None, BALANCE])
def test_an_epoch_holds_every_piece_once_and_no_pack_is_too_full(
    indexes: list[Index], balance: PackCost | None
) -> None:
    plan = plan_of(indexes, balance=balance)
    steps = list(plan.steps())
    gone = {item.key for item in account(plan, plan.end).ledger.refused}
    every = {
        (source, document, piece): 1
        for source, index in enumerate(indexes)
        for document in range(len(index))
        if index.key(document) not in gone
        for piece in range(index.piece_start[document + 1] - index.piece_start[document])
    }
    assert uses(steps) == every
    packs = [pack for step in steps for pack in step.packs]
    assert [pack.number for pack in packs] == list(range(len(packs)))
    for pack in packs:
        assert 0 < pack.tokens <= 128
        assert pack.patches <= 64
        assert pack.tokens == sum(entry.tokens for entry in pack.entries)
    assert [step.number for step in steps] == list(range(plan.total_steps))


def contents(packs: Sequence[PlannedPack]) -> Counter[tuple[object, ...]]:
    return Counter((pack.entries, pack.tokens, pack.pairs, pack.patches) for pack in packs)


@pytest.mark.parametrize("across", [False, True])
def test_balance_keeps_the_packs_of_a_window_and_makes_steps_of_like_cost(
    indexes: list[Index], across: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "BLOCK", 10_000)
    changes = {"epochs": 12, "tokens_per_step": 256, "across_documents": across}
    plain = plan_of(indexes, **changes)
    plan = plan_of(indexes, **changes, balance=BALANCE)
    before, after = list(plain.steps()), list(plan.steps())
    assert [len(step.packs) for step in after] == [len(step.packs) for step in before]
    assert [step.after for step in after] == [step.after for step in before]
    for step in after:
        for pack in step.packs:
            lengths = [entry.tokens for entry in pack.entries]
            assert pack.pairs == (sum(lengths) ** 2 if across else sum(x * x for x in lengths))

    def costs(step: PlannedStep) -> list[float]:
        return [p.tokens + 0.01 * p.pairs + 0.1 * p.patches for p in step.packs]

    assert {step.after.block for step in before[:-1]} == {0}, "all of it should be one block"
    whole = sum(len(step.packs) == plan.packs_per_step for step in before)
    starts = [*range(0, whole - WINDOW + 1, WINDOW), len(before)]
    for start, stop in itertools.pairwise(starts):
        own, theirs = ([p for s in steps[start:stop] for p in s.packs] for steps in (after, before))
        assert contents(own) == contents(theirs)
    assert len(starts) > 3
    for step in after:
        assert costs(step) == sorted(costs(step), reverse=True)
    spread = [sum(max(costs(s)) - min(costs(s)) for s in steps) for steps in (before, after)]
    assert spread[1] < spread[0] / 4


@pytest.mark.parametrize("balance", [None, BALANCE])
def test_going_on_with_a_larger_budget_changes_no_earlier_step(
    indexes: list[Index], balance: PackCost | None
) -> None:
    changes: dict[str, Any] = {"epochs": None, "balance": balance}
    longest = list(plan_of(indexes, token_budget=30_000, **changes).steps())
    for budget in (1, 700, 5000, 12_345):
        plan = plan_of(indexes, token_budget=budget, **changes)
        steps = list(plan.steps())
        assert steps == longest[: len(steps)]
        longer = plan_of(indexes, token_budget=30_000, **changes)
        assert list(longer.steps(steps[-1].after)) == longest[len(steps) :]


def test_a_token_budget_is_room_for_so_many_and_every_step_is_full(indexes: list[Index]) -> None:
    for budget, steps in ((1, 1), (512, 1), (513, 2), (20_000, 40)):
        plan = plan_of(indexes, epochs=None, token_budget=budget)
        assert plan.total_steps == steps
        assert [len(step.packs) for step in plan.steps()] == [4] * steps
    assert plan_of(indexes, epochs=None, token_budget=1).hash == plan.hash


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([100, 128, 300]),
    packs=st.integers(1, 5),
    weights=st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.3, 1.0])),
    balance=st.sampled_from([None, BALANCE]),
    world=st.integers(1, 7),
    data=st.data(),
)
def test_every_rank_makes_the_same_plan_and_any_cursor_goes_on_exactly(
    indexes: list[Index],
    seed: int,
    tokens: int,
    packs: int,
    weights: tuple[float, float],
    balance: PackCost | None,
    world: int,
    data: st.DataObject,
) -> None:
    changes = {
        "seed": seed,
        "tokens": tokens,
        "tokens_per_step": packs * tokens,
        "weights": list(weights),
        "balance": balance,
    }
    mine, other = plan_of(indexes, **changes), plan_of(indexes, **changes)
    steps = list(mine.steps())
    assert mine.hash == other.hash
    assert list(other.steps()) == steps
    at = data.draw(st.integers(0, len(steps) - 1))
    cursor = Cursor.from_json(json.loads(json.dumps(steps[at].after.to_json())))
    assert list(plan_of(indexes, **changes).steps(cursor)) == steps[at + 1 :]
    for step in steps:
        dealt = [micro_packs(step, rank, world) for rank in range(world)]
        assert len({len(own) for own in dealt}) == 1
        assert tuple(dealt_order(dealt)) == step.packs


OTHER_PROCESS = """
import sys
from pathlib import Path
from packing_toys import cost, image_cost
from data_packing import Plan, build_index
from data_packing import plan as module
module.BLOCK, module.STEPS = 100, 1
indexes = [
    build_index(sorted(Path(sys.argv[1]).glob(f"{name}-*.tar")), cost, "toy processor")
    for name in ("captions", "pages")
]
plan = Plan(indexes, [1.0, 1.0], processor_fingerprint="p", image_cost=image_cost, tokens=128,
            patches=64, tokens_per_step=512, seed=0, epochs=1)
print(plan.hash, module.hashlib.sha256(repr(list(plan.steps())).encode()).hexdigest())
"""


def test_another_process_makes_the_same_plan(indexes: list[Index]) -> None:
    plan = plan_of(indexes)
    steps = hashlib.sha256(repr(list(plan.steps())).encode()).hexdigest()
    folder = indexes[0].paths[0].parent
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    for hash_seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", OTHER_PROCESS, str(folder)],
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert printed.stdout.split() == [plan.hash, steps]


def test_the_state_is_small(indexes: list[Index]) -> None:
    plan = plan_of(indexes)
    last = list(plan.steps())[-1].after
    state = {"plan": plan.hash, **last.to_json()}
    assert len(json.dumps(state)) < 1024
    assert len(pickle.dumps(last)) < 1024


def test_the_hash_changes_with_everything_that_changes_packs(indexes: list[Index]) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"tokens": 129},
        {"patches": 65},
        {"tokens_per_step": 1024},
        {"epochs": 2},
        {"max_documents": 2},
        {"weights": [1.0, 2.0]},
        {"caps": [None, 3]},
        {"processor_fingerprint": "q"},
        {"across_documents": True},
        {"balance": BALANCE},
        {"balance": PackCost(1.0, 0.01, 0.02)},
        {"image_cost": lambda height, width: (5, 16)},
    ]
    hashes = [plan_of(indexes, **change).hash for change in changes]
    hashes.append(plan_of(indexes[:1]).hash)
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("packs", [1, 3, 4, 40])
@pytest.mark.parametrize("balance", [None, BALANCE])
def test_only_the_last_step_is_short_though_blocks_end_anywhere(
    indexes: list[Index], packs: int, balance: PackCost | None
) -> None:
    plan = plan_of(indexes, epochs=3, tokens_per_step=128 * packs, balance=balance)
    steps = list(plan.steps())
    sizes = [len(step.packs) for step in steps]
    assert set(sizes[:-1]) == {packs}
    assert 1 <= sizes[-1] <= packs
    assert sum(sizes) == plan.total_packs == len({p.number for s in steps for p in s.packs})
    assert len({step.after.block for step in steps}) > 3 or packs == 40
    whole = uses(list(plan_of(indexes, epochs=3).steps()))
    assert uses(steps) == whole
    for at in range(len(steps)):
        assert plan.cursor(at) == (steps[at - 1].after if at else Cursor())
    assert plan.end == steps[-1].after


def test_a_block_grows_with_the_step(indexes: list[Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "STEPS", 20)
    plan = plan_of(indexes, epochs=20)
    assert plan.block_units(plan.first) % 100 == 0
    starts = [step.number for step in plan.steps() if step.after.offset < 4]
    gaps = np.diff([0, *starts])
    assert len(gaps) > 3
    assert min(gaps[:-1]) >= 19


def test_the_document_limit_holds(indexes: list[Index]) -> None:
    steps = plan_of(indexes, max_documents=2).steps()
    assert max(len(pack.entries) for step in steps for pack in step.packs) == 2


def test_cursors_of_another_plan_are_refused(indexes: list[Index]) -> None:
    plan = plan_of(indexes)
    here = plan.first.fingerprint
    for cursor in (
        Cursor(1, 1, 0, 0, here),
        Cursor(1, 0, 90, 0, here),
        Cursor(1, 0, 0, 900, here),
        Cursor(10_000, 0, 0, 0, here),
        Cursor(1, 0, 0, 4, "another"),
        Cursor(0, 0, 1, 0),
    ):
        with pytest.raises(ValueError, match="no place in this plan"):
            next(plan.steps(cursor))
    assert list(plan.steps(list(plan.steps())[-1].after)) == []
    place = plan.end.to_json()
    for value in (
        {},
        {"step": 1},
        place | {"step": -1},
        place | {"offset": True},
        place | {"x": 1},
    ):
        with pytest.raises(ValueError, match="not a data cursor"):
            Cursor.from_json(value)


def test_wrong_settings_are_refused(indexes: list[Index], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of the two"):
        plan_of(indexes, token_budget=5)
    with pytest.raises(ValueError, match="one of the two"):
        plan_of(indexes, epochs=None)
    with pytest.raises(ValueError, match="tokens is 0"):
        plan_of(indexes, tokens=0)
    with pytest.raises(ValueError, match="epochs is 0"):
        plan_of(indexes, epochs=0)
    with pytest.raises(
        ValueError, match="no source has a usable .* first refused: toys page: piece 1"
    ):
        plan_of([index_of([page([500])], tmp_path)])
    with pytest.raises(ValueError, match="so small"):
        plan_of(indexes, weights=[0.001, 0.001])
    with pytest.raises(ValueError, match="2 sources but 1 weights, 2 caps"):
        plan_of(indexes, weights=[1.0])
    with pytest.raises(ValueError, match="rank 2 of 2"):
        micro_packs(next(plan_of(indexes).steps()), 2, 2)


def test_sources_of_one_name_are_told_apart_by_folder(tmp_path: Path) -> None:
    shards = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        documents = [*captions(3), page([500], "long"), Refusal("raw", "bad", "broken")]
        shards.append(index_of(documents, tmp_path / folder, "captions").paths)
    names = source_names(shards)
    assert names == ["a/captions", "b/captions"]
    assert source_names([shards[0], shards[0]]) == ["captions", "captions (2)"]
    assert source_names(shards[:1]) == ["captions"]
    indexes = [
        build_index(p, cost, "toys", name=name) for p, name in zip(shards, names, strict=True)
    ]
    plan = plan_of(indexes)
    ledger = account(plan, plan.end).ledger
    for name in names:
        counts = ledger.counts[name]
        assert (counts.read, counts.used, counts.refused) == (5, 3, 2)
    ledger.drop(Refusal(name, "k1", "truncated PNG") for name in names)
    assert [ledger.counts[name].used for name in names] == [2, 2]
    with pytest.raises(ValueError, match="two sources are named 'captions'"):
        plan_of([build_index(paths, cost, "toys") for paths in shards])
