from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from packing_toys import index_of, page, plan_of, two_sources, uses

from data_packing import plan as plan_module
from data_packing.account import Account, account, summary
from data_packing.index import Index
from data_packing.plan import Plan


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> list[Index]:
    return two_sources(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BLOCK", 100)
    monkeypatch.setattr(plan_module, "STEPS", 1)


def whole(plan: Plan) -> Account:
    return account(plan, plan.end)


def test_the_ledger_accounts_for_every_document(indexes: list[Index]) -> None:
    plan = plan_of(indexes)
    ledger = whole(plan).ledger
    pages = ledger.counts["pages"]
    assert (pages.read, pages.refused, pages.unreached) == (42, 2, 0)
    assert pages.read == pages.used + pages.refused
    assert pages.split == len(ledger.split) == sum(number % 9 + 1 > 4 for number in range(40))
    assert {item.key: item.reason for item in ledger.refused} == {
        "bad": "broken image",
        "too long": "piece 1 of 1 needs 501 tokens, a pack holds 128",
    }
    facts, _ = summary(plan)
    assert facts["documents"] == 242
    assert facts["used"] == 240
    assert [reason["key"] for reason in facts["reasons"]] == ["bad", "too long"]
    assert 0.5 < facts["efficiency"] <= 1.0
    json.dumps(facts)


def test_documents_that_the_run_does_not_reach_are_counted_as_such(indexes: list[Index]) -> None:
    plan = plan_of(indexes, epochs=None, token_budget=1000)
    seen = {(entry[0], entry[1]) for entry in uses(list(plan.steps()))}
    for source, name in enumerate(("captions", "pages")):
        counts = whole(plan).ledger.counts[name]
        assert counts.used == sum(1 for at, _ in seen if at == source)
        assert counts.read == counts.used + counts.refused + counts.unreached
        assert counts.unreached > 0


def test_split_counts_only_documents_that_the_run_uses(tmp_path: Path) -> None:
    pages = [page([60] * 4, f"page{number}") for number in range(20)]
    plan = plan_of([index_of(pages, tmp_path)], epochs=None, token_budget=100, tokens_per_step=128)
    counts = whole(plan).ledger.counts["toys"]
    assert counts.used + counts.unreached == 20
    assert counts.unreached > 0
    assert counts.split == counts.used == len(whole(plan).ledger.split)
    entries = [entry for step in plan.steps() for pack in step.packs for entry in pack.entries]
    slices = Counter(f"page{entry.document}" for entry in entries)
    assert {key: count for (_, key), count in whole(plan).ledger.slices.items()} == slices


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"epochs": None, "token_budget": 3000}])
def test_shares_are_those_of_the_packs(indexes: list[Index], changes: dict[str, Any]) -> None:
    plan = plan_of(indexes, weights=[0.5, 2.0], **changes)
    entries = [entry for step in plan.steps() for pack in step.packs for entry in pack.entries]
    tokens = sum(entry.tokens for entry in entries)
    shares = whole(plan).shares()
    for source, index in enumerate(indexes):
        own = [entry for entry in entries if entry.source == source]
        share = shares[index.name]
        assert share["got"] == len(own) / len(entries)
        assert share["tokens"] == sum(entry.tokens for entry in own) / tokens
        if changes["epochs"]:
            assert share["got"] == pytest.approx(share["asked"], abs=0.01)
    units = [len(slices) for slices in plan.first.slices]
    assert shares[indexes[1].name]["asked"] == 2 * units[1] / (0.5 * units[0] + 2 * units[1])


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"epochs": None, "token_budget": 30_000}])
def test_an_account_holds_what_is_before_its_cursor(
    indexes: list[Index], changes: dict[str, Any]
) -> None:
    plan = plan_of(indexes, **changes)
    steps = list(plan.steps())
    placed, tokens = [0, 0], [0, 0]
    documents: list[set[int]] = [set(), set()]
    for step in steps:
        for entry in (entry for pack in step.packs for entry in pack.entries):
            placed[entry.source] += 1
            tokens[entry.source] += entry.tokens
            documents[entry.source].add(entry.document)
        found = account(plan, step.after)
        assert found.placed.tolist() == placed
        assert found.tokens.tolist() == tokens
        used = [counts.used for counts in found.ledger.counts.values()]
        assert used == [len(own) for own in documents]
    assert step.after == plan.end
