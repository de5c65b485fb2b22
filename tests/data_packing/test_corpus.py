from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_toys import captions, cost, encode, page, plan_of

from data_packing import plan as plan_module
from data_packing.account import account, summary
from data_packing.corpus import Corpus, Stop
from data_packing.index import Index, build_index
from data_packing.loader import Loader
from data_packing.pack import TENSORS
from data_packing.plan import Plan
from data_packing.planned import Cursor, PlannedStep
from data_packing.sharding import write_shards

WINDOW = 60  # documents; the large sources have 250 between them
NAMES = ("captions", "pages", "few")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BLOCK", 25)
    monkeypatch.setattr(plan_module, "STEPS", 1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """150 captions and 100 pages in shards of 10, and 12 documents that are too few to cut."""
    folder = tmp_path_factory.mktemp("corpus")
    pages = [page([20] * (number % 9 + 1), f"page{number}", True) for number in range(99)]
    return [
        write_shards(captions(150), folder, "captions", 10).paths,
        write_shards([*pages, page([500], "too long")], folder, "pages", 10).paths,
        write_shards(captions(12, start=500), folder, "few", 3).paths,
    ]


class Counted:
    """Makes indexes and remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, source: int, paths: Sequence[Path], stop: Stop) -> Index:
        self.asked.append((source, len(paths)))
        return build_index(paths, cost, "toys", name=NAMES[source], stop=stop)


def corpus_of(shards: list[list[Path]], window: int = WINDOW, seed: int = 0) -> Corpus:
    return Corpus(shards, Counted(), window=window, seed=seed)


def windowed(shards: list[list[Path]], **changes: Any) -> Plan:
    return plan_of(corpus_of(shards), **changes)


def keys(steps: Sequence[PlannedStep]) -> list[str]:
    return [
        pack.indexes[entry.source].key(entry.document)
        for step in steps
        for pack in step.packs
        for entry in pack.entries
    ]


def test_a_corpus_is_cut_into_windows_and_small_sources_are_in_all(
    shards: list[list[Path]],
) -> None:
    corpus = corpus_of(shards)
    assert corpus.windows == 5  # 250 documents of large sources, 60 to a window
    assert corpus.resident == [False, False, True]
    for source, paths in enumerate(shards[:2]):
        sizes = [corpus.shards(source, window) for window in range(5)]
        assert sum(sizes) == len(paths)
        assert max(sizes) - min(sizes) <= 1
    loaded = [corpus.load(window) for window in range(5)]
    for source, paths in enumerate(shards[:2]):
        cut = [path for indexes in loaded for path in indexes[source].paths]
        assert sorted(cut) == paths
        assert cut != paths
    assert len({id(indexes[2]) for indexes in loaded}) == 1
    assert [corpus.at(visit) for visit in range(5)] != [corpus.at(visit) for visit in range(5, 10)]
    for epoch in range(3):
        assert sorted(corpus.at(epoch * 5 + number) for number in range(5)) == list(range(5))
    assert corpus_of(shards, window=250).windows == 1
    assert corpus_of([shards[0][:1], shards[1][:2]], window=3).resident == [True, True]
    with pytest.raises(ValueError, match="window is 0"):
        corpus_of(shards, window=0)


@pytest.mark.parametrize("packs", [1, 4, 30])
def test_every_epoch_holds_every_document_once_whatever_the_windows(
    shards: list[list[Path]], packs: int
) -> None:
    whole = plan_of(corpus_of(shards, window=1000), tokens_per_step=128 * packs)
    assert whole.corpus.windows == 1
    once = Counter(keys(list(whole.steps())))
    for epochs in (1, 3):
        plan = windowed(shards, epochs=epochs, tokens_per_step=128 * packs)
        steps = list(plan.steps())
        assert Counter(keys(steps)) == Counter({key: epochs * n for key, n in once.items()})
        sizes = [len(step.packs) for step in steps]
        assert set(sizes[:-1]) <= {packs}
        assert len(steps) == plan.total_steps
        assert sum(sizes) == plan.total_packs
        assert all(pack.tokens <= 128 and pack.patches <= 64 for s in steps for pack in s.packs)


def test_a_small_source_is_spread_over_the_epoch(shards: list[list[Path]]) -> None:
    plan = windowed(shards, weights=[1.0, 1.0, 2.0])
    of = [entry.source for step in plan.steps() for p in step.packs for entry in p.entries]
    quarters = [of[at * len(of) // 4 : (at + 1) * len(of) // 4].count(2) for at in range(4)]
    assert sum(quarters) == 24
    assert min(quarters) >= 3


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"epochs": None, "token_budget": 40_000}])
def test_any_cursor_goes_on_exactly_in_another_process(
    shards: list[list[Path]], changes: dict[str, Any]
) -> None:
    steps = list(windowed(shards, **changes).steps())
    assert len({step.after.visit for step in steps}) >= 10
    for at in range(0, len(steps), 3):
        again = windowed(shards, **changes)
        cursor = Cursor.from_json(steps[at].after.to_json())
        again.check(cursor)
        assert list(again.steps(cursor)) == steps[at + 1 :]


def test_the_first_step_needs_the_first_window_only(shards: list[list[Path]]) -> None:
    make = Counted()
    plan = plan_of(Corpus(shards, make, window=WINDOW), epochs=None, token_budget=100_000)
    assert [source for source, _ in make.asked] == [0, 1, 2]
    steps = plan.steps()
    assert plan.total_steps == 196
    first = next(steps)
    assert len(first.packs) == 4
    deadline = time.monotonic() + 30
    while len(make.asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)  # the next window, in the background; the small source is not read again
    assert [source for source, _ in make.asked] == [0, 1, 2, 0, 1]
    while next(steps).after.visit == 0:
        pass
    assert len(make.asked) <= 7


def test_memory_holds_few_windows_however_many_there_are(shards: list[list[Path]]) -> None:
    alive: weakref.WeakSet[Owner] = weakref.WeakSet()

    def make(source: int, paths: Sequence[Path], stop: Stop) -> Index:
        index = build_index(paths, cost, "toys", name=NAMES[source])
        index.paths = Owner(index.paths)
        alive.add(index.paths)
        return index

    plan = plan_of(Corpus(shards[:2], make, window=20), epochs=1)
    assert plan.corpus.windows == 13
    most = 0
    for _ in plan.steps():
        gc.collect()
        most = max(most, len(alive))
    assert 2 <= most <= 2 * 4  # of two sources: this window, the next, the first, one on its way


class Owner(list[Path]):
    """A list that can be referred to weakly."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_a_plan_is_walked_again_after_its_steps_were_closed(shards: list[list[Path]]) -> None:
    here = threading.current_thread()

    def slow(source: int, paths: Sequence[Path], stop: Stop) -> Index:
        while threading.current_thread() is not here and not stop():
            time.sleep(0.01)
        return build_index(paths, cost, "toys", name=NAMES[source], stop=stop)

    whole = list(windowed(shards).steps())
    plan = plan_of(Corpus(shards, slow, window=WINDOW), token_budget=10**6, epochs=None)
    for _ in range(2):
        steps = plan.steps()
        assert next(steps) == whole[0]
        steps.close()  # type: ignore[attr-defined]


def test_closing_the_steps_gives_up_what_is_being_counted(shards: list[list[Path]]) -> None:
    reached, ended = threading.Event(), threading.Event()
    first = threading.current_thread()

    def slow(source: int, paths: Sequence[Path], stop: Stop) -> Index:
        if threading.current_thread() is not first:
            reached.set()
            while not stop():
                time.sleep(0.01)
            ended.set()
            raise InterruptedError
        return build_index(paths, cost, "toys", name=NAMES[source])

    steps = plan_of(Corpus(shards, slow, window=WINDOW), token_budget=9999, epochs=None).steps()
    next(steps)
    assert reached.wait(30)
    steps.close()  # type: ignore[attr-defined]
    assert ended.wait(30)


def test_the_account_of_windows_is_that_of_their_packs(shards: list[list[Path]]) -> None:
    plan = windowed(shards, epochs=2)
    seen: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    placed = [0, 0, 0]
    for at, step in enumerate(plan.steps()):
        for pack in step.packs:
            for entry in pack.entries:
                seen[entry.source].add(pack.indexes[entry.source].key(entry.document))
                placed[entry.source] += 1
        if at % 7 == 0:
            found = account(plan, step.after)
            assert found.placed.tolist() == placed
            assert [c.used for c in found.ledger.counts.values()] == [len(seen[s]) for s in seen]
            for name, counts in found.ledger.counts.items():
                assert counts.read == counts.used + counts.refused + counts.unreached
                total = len(shards[NAMES.index(name)])
                assert 0 <= counts.shards_unread < total
    facts, found = summary(plan)
    assert facts["documents"] == 262
    assert (facts["used"], facts["refused"], facts["unreached"]) == (261, 1, 0)
    assert [item.key for item in found.ledger.refused] == ["too long"]
    assert not any(counts.shards_unread for counts in found.ledger.counts.values())
    start = next(step.after for step in plan.steps() if step.after.visit == 1)
    assert account(plan, start).ledger.counts["captions"].shards_unread in (9, 12)
    before = account(plan, Cursor(start.step, 1, 0, 0, start.window))
    assert before.ledger.counts["captions"].shards_unread == 12, "the second is not begun"
    short = windowed(shards, epochs=None, token_budget=600)
    counts = account(short, short.end).ledger.counts
    assert counts["captions"].shards_unread == 12
    assert counts["captions"].read == 30
    assert counts["few"].shards_unread == 0


def test_windows_of_a_weight_and_a_cap_give_what_was_asked(shards: list[list[Path]]) -> None:
    plan = windowed(shards, weights=[0.5, 1.0, 1.0], caps=[None, 40, None], epochs=4)
    found = account(plan, plan.end)
    assert found.placed[0] == 300
    assert found.placed[1] == 160
    shares = found.shares()
    for share in shares.values():
        assert share["got"] == pytest.approx(share["asked"], abs=1e-9)


@pytest.mark.parametrize("cap", [3, 100, 150, 209])
def test_a_cap_is_kept_by_windows_of_any_size(tmp_path: Path, cap: int) -> None:
    sizes = [20] * 10 + [1] * 10
    paths = [
        write_shards(captions(size, start=100 * at), tmp_path, f"s{at:02d}", 50).paths[0]
        for at, size in enumerate(sizes)
    ]
    corpus = Corpus(
        [paths], lambda s, own, stop: build_index(own, cost, "toys", name="toys"), window=50
    )
    assert corpus.windows == 8
    plan = plan_of(corpus, caps=[cap], epochs=3)
    seen = keys(list(plan.steps()))
    assert len(seen) == 3 * cap
    assert len(set(seen)) >= min(210, 2 * cap)


def test_a_cursor_may_stand_before_a_visit_that_takes_nothing(shards: list[list[Path]]) -> None:
    changes: dict[str, Any] = {"caps": [1], "epochs": 6, "tokens_per_step": 128}
    steps = list(plan_of(corpus_of(shards[:1]), **changes).steps())
    assert len(steps) == 6
    assert steps[-1].after.visit == 18, "of three visits to an epoch two take nothing"
    for at, step in enumerate(steps):
        again = plan_of(corpus_of(shards[:1]), **changes)
        again.check(step.after)
        assert list(again.steps(step.after)) == steps[at + 1 :]


def test_data_that_changed_under_the_cursor_is_refused(shards: list[list[Path]]) -> None:
    steps = list(windowed(shards, epochs=None, token_budget=20_000).steps())
    cursor = steps[len(steps) // 2].after
    assert cursor.visit > 0
    other = [shards[0][1:], shards[1], shards[2]]
    again = windowed(other, epochs=None, token_budget=20_000)
    assert again.hash != windowed(shards, epochs=None, token_budget=20_000).hash
    with pytest.raises(ValueError, match="no place in this plan"):
        again.check(cursor)


def test_other_windows_than_the_first_are_in_the_hash(shards: list[list[Path]]) -> None:
    """By the names of their shards: their content is compared when the run comes to them."""
    one = corpus_of(shards)
    renamed = [[path.with_name(f"x{path.name}") for path in paths] for paths in shards]
    other = corpus_of(shards)
    other._groups = [
        [
            group if at == one.at(0) or len(groups) == 1 else renamed[source][: len(group)]
            for at, group in enumerate(groups)
        ]
        for source, groups in enumerate(one._groups)
    ]
    changes: dict[str, Any] = {"epochs": None, "token_budget": 9999}
    assert plan_of(one, **changes).hash != plan_of(other, **changes).hash


def test_who_is_in_which_window_depends_on_the_seed(shards: list[list[Path]]) -> None:
    cuts = [corpus_of(shards, seed=seed)._groups[0] for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]


def test_a_window_that_changed_since_it_was_opened_ends_the_run(shards: list[list[Path]]) -> None:
    told: dict[int, str] = {}
    changes: dict[str, Any] = {"epochs": 2, "tell": told.__setitem__}
    whole = list(windowed(shards, **changes).steps())
    assert sorted(told) == list(range(5))
    assert list(windowed(shards, epochs=2, seen=told).steps()) == whole
    last = plan_of(corpus_of(shards)).corpus.at(4)
    changed = windowed(shards, epochs=None, token_budget=99_999, seen=told | {last: "other"})
    steps = changed.steps()
    same = list(itertools.islice(steps, 6))
    assert same == whole[:6]
    with pytest.raises(ValueError, match=f"the data changed .* window {last + 1} of 5"):
        list(steps)
    plan_of(corpus_of(shards, window=1000), seen={0: "of one window the hash is enough"})


def test_a_later_window_that_is_too_bad_ends_the_run_there(
    shards: list[list[Path]], tmp_path: Path
) -> None:
    good = [page([20] * 2, f"page{number}", True) for number in range(40)]
    bad = [page([500], f"bad{number}") for number in range(10)]
    paths = [write_shards([*good, *bad], tmp_path, "pages", 10).paths]
    corpus = corpus_of(paths, window=10, seed=3)
    steps = plan_of(corpus, epochs=None, token_budget=9999, max_refused=0.5).steps()
    next(steps)
    with pytest.raises(ValueError, match="10 of 10 documents cannot be used"):
        list(steps)


def test_sources_too_thin_for_an_epoch_are_refused_and_do_not_hang(
    shards: list[list[Path]],
) -> None:
    plan = plan_of(corpus_of(shards[:2]), weights=[1e-6, 1e-6], epochs=None, token_budget=1000)
    with pytest.raises(ValueError, match="so small that 10 epochs hold no document"):
        list(plan.steps())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_packs_that_span_windows(shards: list[list[Path]], workers: int) -> None:
    changes: dict[str, Any] = {"epochs": 1, "tokens_per_step": 640}
    plan = windowed(shards, **changes)
    expected = keys(list(windowed(shards, **changes).steps()))
    packs = [
        pack for _, own in Loader(plan, encode, rank=0, world=1, workers=workers) for pack in own
    ]
    read = [key for pack in sorted(packs, key=lambda pack: pack.number) for key in pack.keys]
    assert Counter(read) == Counter(expected)
    assert read == expected
    middle = list(windowed(shards, **changes).steps())[len(packs) // 10].after
    rest = [
        pack
        for _, own in Loader(plan, encode, rank=0, world=1, workers=0, cursor=middle)
        for pack in own
    ]
    assert rest
    by_number = {pack.number: pack for pack in packs}
    for pack in rest:
        twin = by_number[pack.number]
        assert all(torch.equal(getattr(pack, n), getattr(twin, n)) for n in TENSORS)
