from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing_toys import (
    SIDE,
    captions,
    cost,
    dealt_order,
    encode,
    image,
    image_cost,
    index_of,
    page,
    png,
)

from data_packing import loader as loader_module
from data_packing import plan as plan_module
from data_packing.account import account
from data_packing.balance import PackCost
from data_packing.document import Document, DocumentError, Image, Text
from data_packing.files import OpenFiles, save_arrays
from data_packing.images import decode_all
from data_packing.index import Index, build_index, source_names
from data_packing.loader import Loader
from data_packing.loss_weights import Weighting
from data_packing.pack import TENSORS, Pack
from data_packing.plan import Plan
from data_packing.planned import Cursor, PlannedStep, micro_packs
from data_packing.sample import Sample
from data_packing.sharding import write_shards
from data_packing.shards import index_path, load_index

Steps = list[tuple[PlannedStep, list[Pack]]]


def encode_or_crash(document: Document) -> Sample:
    if document.key == "k7":
        raise KeyError("a bug")
    return encode(document)


def encode_too_long(document: Document) -> Sample:
    sample = encode(document)
    if document.key == "k7":
        sample.input_ids = np.append(sample.input_ids, 0)
        sample.labels = sample.input_ids
    return sample


def encode_two_views(document: Document) -> Sample:
    """As `encode`, with two views of an image: all of it, and what is below its first row."""
    sample = encode(document)
    pixels = decode_all(document.images)
    sample.pixels = [view for image in pixels for view in (image, image[1:])]
    for slot in sample.slots:
        slot.views = 2
    return sample


def encode_and_die(document: Document) -> Sample:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(document)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BLOCK", 30)
    monkeypatch.setattr(plan_module, "STEPS", 1)


def plan_of(index: Index, across_documents: bool = False) -> Plan:
    return plan_over([index], [1.0], epochs=2, across_documents=across_documents)


def plan_over(
    indexes: list[Index], weights: list[float], epochs: int, across_documents: bool = False
) -> Plan:
    return Plan(
        indexes,
        weights,
        processor_fingerprint="p",
        image_cost=image_cost,
        tokens=128,
        patches=64,
        tokens_per_step=640,
        seed=0,
        epochs=epochs,
        across_documents=across_documents,
    )


@pytest.fixture
def data(tmp_path: Path) -> tuple[Plan, Index]:
    pages = [page([20] * 6, f"page{number}", True) for number in range(4)]
    index = index_of([*captions(40), *pages], tmp_path, per_shard=20)
    return plan_of(index), index


def load(
    plan: Plan, index: Index, code: Callable[[Document], Sample] = encode, **changes: Any
) -> Steps:
    return list(Loader(plan, code, **({"rank": 0, "world": 1, "workers": 0} | changes)))


def same(one: Steps, other: Steps) -> bool:
    return [step for step, _ in one] == [step for step, _ in other] and all(
        a.keys == b.keys
        and a.number == b.number
        and a.refused == b.refused
        and a.across_documents == b.across_documents
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)
        for (_, mine), (_, others) in zip(one, other, strict=True)
        for a, b in zip(mine, others, strict=True)
    )


def test_packs_hold_what_the_plan_says(data: tuple[Plan, Index]) -> None:
    plan, index = data
    steps = load(*data)
    assert [step for step, _ in steps] == list(plan.steps())
    for step, packs in steps:
        for planned, pack in zip(step.packs, packs, strict=True):
            assert pack.number == planned.number
            assert len(pack.input_ids) == planned.tokens
            assert pack.keys == [index.key(entry.document) for entry in planned.entries]
            assert len(pack.sizes) * 16 == planned.patches
            assert pack.refused == []


@pytest.mark.parametrize("shared_from", [1, 2**20])
def test_workers_change_nothing(
    data: tuple[Plan, Index], shared_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_SHARED_FROM", shared_from)
    assert same(load(*data), load(*data, workers=2, prefetch=3000))


def test_weights_arrive_from_workers_and_every_slice_counts_for_itself(
    data: tuple[Plan, Index],
) -> None:
    plan, index = data
    weighting = Weighting("sample", ((1, 1),))
    steps = load(*data, weighting=weighting)
    assert same(steps, load(*data, weighting=weighting, workers=2))
    for step, packs in steps:
        for planned, pack in zip(step.packs, packs, strict=True):
            assert pack.weights.shape == (2, planned.tokens)
            assert pack.weights.sum(1).tolist() == pytest.approx([len(planned.entries)] * 2)
    assert any(not entry.whole for step, _ in steps for p in step.packs for entry in p.entries)
    world = next(plan.steps()).packs
    idle = load(*data, weighting=weighting, rank=len(world), world=len(world) + 1)[0][1]
    assert [pack.weights.shape for pack in idle] == [(2, 0)]
    with pytest.raises(ValueError, match="uses of 2 sources, the plan has 1"):
        load(plan, index, weighting=Weighting("token", ((1,), (1,))))


def loaded_from_two(plan: Plan, indexes: list[Index], weighting: Weighting, workers: int) -> Steps:
    return list(Loader(plan, encode, rank=0, world=1, workers=workers, weighting=weighting))


@pytest.mark.parametrize("across", [False, True])
def test_a_pack_says_whether_its_documents_are_joined(
    data: tuple[Plan, Index], across: bool
) -> None:
    plan, index = plan_of(data[1], across), data[1]
    steps = load(plan, index)
    assert same(steps, load(plan, index, workers=2))
    for pack in (pack for _, packs in steps for pack in packs):
        assert pack.across_documents is across
        assert len(pack.cu_seqlens) == (2 if across else len(pack.keys) + 1)
    assert any(len(pack.keys) > 1 for _, packs in steps for pack in packs)


def test_a_source_weighs_nothing_in_an_objective_that_does_not_use_it(tmp_path: Path) -> None:
    toys = index_of(captions(30), tmp_path)
    games = index_of([page([30], f"g{number}") for number in range(20)], tmp_path, "games")
    damage_image(toys.paths[0], toys, 7)  # sources must not shift when a document is left out
    plan = Plan(
        [toys, games],
        [1.0, 1.0],
        processor_fingerprint="p",
        image_cost=image_cost,
        tokens=128,
        patches=64,
        tokens_per_step=640,
        seed=0,
        epochs=1,
    )
    weighting = Weighting("token", ((1, 0), (1, 1)))
    steps = loaded_from_two(plan, [toys, games], weighting, 0)
    assert same(steps, loaded_from_two(plan, [toys, games], weighting, 2))
    packs = [pack for _, packs in steps for pack in packs]
    assert sum(len(pack.refused) for pack in packs) == 1
    for pack in packs:
        ends = pack.cu_seqlens.tolist()
        for key, start, stop in zip(pack.keys, ends, ends[1:], strict=False):
            counted = pack.weights[:, start:stop].sum(1).tolist()
            learned = stop - start - 1
            assert counted == [learned, learned if key.startswith("g") else 0]
    assert any({key[0] for key in pack.keys} == {"g", "k"} for pack in packs)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_another_world_size_deals_the_same_packs(data: tuple[Plan, Index], world: int) -> None:
    alone = load(*data)
    ranks = [load(*data, rank=rank, world=world) for rank in range(world)]
    for number, (step, packs) in enumerate(alone):
        turns = [packs_of_rank[number][1] for packs_of_rank in ranks]
        assert len({len(own) for own in turns}) == 1
        fillers = [pack for own in turns for pack in own if pack.number < 0]
        assert all(pack.learned == 0 for pack in fillers)
        own = [[pack if pack.number >= 0 else None for pack in packs] for packs in turns]
        dealt = dealt_order(own)
        assert [pack.number for pack in dealt] == [p.number for p in step.packs]
        for pack, expected in zip(dealt, packs, strict=True):
            assert torch.equal(pack.input_ids, expected.input_ids)
            assert torch.equal(pack.pixels, expected.pixels)


def test_any_cursor_goes_on_with_the_same_packs_on_other_ranks_and_workers(
    data: tuple[Plan, Index],
) -> None:
    plan, index = data
    whole = load(plan, index)
    for at in (0, 1, len(whole) // 2, len(whole) - 2):
        cursor = Cursor.from_json(whole[at][0].after.to_json())
        assert same(load(plan_of(index), index, cursor=cursor), whole[at + 1 :])
    cursor = whole[2][0].after
    assert same(load(plan, index, cursor=cursor, workers=1), whole[3:])
    second = load(plan, index, cursor=cursor, rank=1, world=2)
    assert [p.number for _, packs in second for p in packs if p.number >= 0] == [
        planned.number
        for step, _ in whole[3:]
        for planned in micro_packs(step, 1, 2)
        if planned is not None
    ]


def digest(packs: Iterable[Pack]) -> list[tuple[int, str]]:
    """The number of every pack, and a hash of the bytes of its tensors."""
    return [
        (
            pack.number,
            hashlib.sha256(b"|".join(tensors_of(pack))).hexdigest(),
        )
        for pack in packs
        if pack.number >= 0
    ]


def tensors_of(pack: Pack) -> Iterator[bytes]:
    for name in TENSORS:
        tensor = getattr(pack, name)
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        yield tensor.numpy().tobytes()


KILLED = """
import json, os, signal, sys
from pathlib import Path
from packing_toys import cost, encode, image_cost
from data_packing import Loader, build_index
from data_packing import plan as module
from test_loader import long_plan

if __name__ == "__main__":
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    module.BLOCK, module.STEPS = 700, 1
    index = build_index(sorted(folder.glob("toys-*.tar")), cost, "toy processor")
    plan = long_plan(index)
    loader = Loader(plan, encode, rank=0, world=1, workers=workers, prefetch=2_000_000)
    for number, (step, packs) in enumerate(loader):
        state = {"plan": plan.hash, **step.after.to_json()}
        (folder / "state.json").write_text(json.dumps(state))
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def long_plan(index: Index) -> Plan:
    return Plan(
        [index],
        [1.0],
        processor_fingerprint="p",
        image_cost=image_cost,
        tokens=128,
        patches=64,
        tokens_per_step=640,
        seed=3,
        epochs=4,
        balance=PackCost(1.0, 0.01, 0.1),
    )


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_after_a_kill_the_next_200_packs_are_the_same_to_the_byte(
    tmp_path: Path, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "BLOCK", 700)
    index = index_of(captions(300), tmp_path, per_shard=100)
    plan = long_plan(index)
    whole = [pack for _, packs in load(plan, index) for pack in packs]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(before)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    state = (tmp_path / "state.json").read_text()
    assert len(state) < 1024
    values = json.loads(state)
    assert values.pop("plan") == plan.hash
    cursor = Cursor.from_json(values)
    expected = digest(whole)[10 * 5 :][:200]
    assert len(expected) == 200

    for world in (1, 2, 4):
        ranks = []
        for rank in range(world):
            again = Loader(
                long_plan(index),
                encode,
                rank=rank,
                world=world,
                workers=after if rank == 0 else 0,
                cursor=cursor,
            )
            ranks.append([packs for _, packs in again])
        merged = [
            pack
            for packs in zip(*ranks, strict=True)
            for pack in dealt_order([[p if p.number >= 0 else None for p in own] for own in packs])
        ]
        assert digest(merged)[:200] == expected


def test_a_pack_counts_for_the_bytes_that_it_holds(
    data: tuple[Plan, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_LEAST", 0)
    monkeypatch.setattr(loader_module, "_SHARED_FROM", 1)
    plan, index = data
    loader = Loader(plan, encode, rank=0, world=1, workers=0, image_bytes=lambda h, w: 3 * SIDE**2)
    packs = [pack for _, packs in load(plan, index) for pack in packs]
    jobs = list(loader._jobs(deque()))
    assert len(jobs) == len(packs)
    for job, pack in zip(jobs, packs, strict=True):
        bounds = ("cu_seqlens", "sizes")
        held = sum(getattr(pack, name).nbytes for name in TENSORS if name not in bounds)
        assert job.size == held
        assert job.shared == pack.pixels.nbytes


def test_images_that_turn_out_larger_than_planned_arrive_all_the_same(
    data: tuple[Plan, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_SHARED_FROM", 1)
    assert same(load(*data), load(*data, workers=1, image_bytes=lambda height, width: 1))


class SlowFiles(OpenFiles):
    """Every read takes 30 ms."""

    def read(self, path: Path, offset: int, size: int) -> bytes:
        time.sleep(0.03)
        return super().read(path, offset, size)


def test_slow_reads_of_a_pack_go_side_by_side(data: tuple[Plan, Index]) -> None:
    plan, index = data
    documents = sum(len(pack.entries) for step in plan.steps() for pack in step.packs)
    expected = load(plan, index)
    start = time.monotonic()
    assert same(load(plan, index, files=SlowFiles()), expected)
    assert time.monotonic() - start < 0.75 * 0.03 * documents
    assert same(load(plan, index, files=SlowFiles(), workers=1), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_gone_ends_the_run_and_is_named(
    data: tuple[Plan, Index], workers: int
) -> None:
    plan, index = data
    index.paths[1].rename(index.paths[1].with_name("elsewhere"))
    with pytest.raises((ValueError, RuntimeError), match=r"No such file .*toys-000001\.tar"):
        load(plan, index, workers=workers)


def damage_image(path: Path, index: Index, number: int) -> None:
    """Overwrite part of a document's image inside the tar file, as if it had been so before."""
    place = index.place(number)
    with open(path, "r+b") as file:
        file.seek(place.offset)
        at = file.read(place.size).index(b"IDAT") + place.offset
        file.seek(at + 10)
        file.write(b"\xff" * 40)
        file.seek(place.offset)
        index.crc[number] = zlib.crc32(file.read(place.size))
    arrays = load_index(path)
    arrays["crc"][place.row] = index.crc[number]
    save_arrays(index_path(path), arrays)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_document_that_fails_to_decode_is_left_out_and_named(
    data: tuple[Plan, Index], workers: int
) -> None:
    plan, index = data
    damage_image(index.paths[0], index, 7)
    before = {pack.number for step in plan.steps() for pack in step.packs}
    steps = load(plan, index, workers=workers)
    refused = [item for _, packs in steps for pack in packs for item in pack.refused]
    assert [(item.source, item.key) for item in refused] == [("toys", "k7")] * 2
    assert "image 1: broken PNG" in refused[0].reason
    keys = [key for _, packs in steps for pack in packs for key in pack.keys]
    assert "k7" not in keys
    assert keys.count("k8") == 2
    assert {pack.number for _, packs in steps for pack in packs} == before


def test_a_damaged_record_is_refused_with_its_key(data: tuple[Plan, Index]) -> None:
    plan, index = data
    place = index.place(7)
    with open(place.path, "r+b") as file:
        file.seek(place.offset + 512)
        file.write(b"}")
    refused = [item for _, packs in load(plan, index) for p in packs for item in p.refused]
    assert {item.key for item in refused} == {"k7"}
    assert "not the bytes that were indexed" in refused[0].reason


def test_a_document_that_encodes_to_another_length_is_refused(data: tuple[Plan, Index]) -> None:
    steps = load(*data, code=encode_too_long)
    refused = [item for _, packs in steps for pack in packs for item in pack.refused]
    assert {item.key for item in refused} == {"k7"}
    assert "the plan says" in refused[0].reason
    assert all(len(pack.input_ids) <= 128 for _, packs in steps for pack in packs)


def test_a_pack_may_lose_all_its_documents(tmp_path: Path) -> None:
    broken = Image(png()[:70], 8, 9)
    index = index_of([Document((broken, Text("a")), "toys", "only")], tmp_path)
    packs = load(plan_of(index), index)[0][1]
    assert [item.key for item in packs[0].refused] == ["only", "only"]  # 2 epochs
    assert packs[0].learned == 0
    assert packs[0].cu_seqlens.tolist() == [0]


@pytest.mark.parametrize("workers", [0, 1])
def test_any_other_failure_ends_the_run_and_names_the_document(
    data: tuple[Plan, Index], workers: int
) -> None:
    with pytest.raises(RuntimeError, match=r"document 'k7' of 'toys' .*KeyError: 'a bug'"):
        load(*data, code=encode_or_crash, workers=workers)
    assert children() == []


def test_a_worker_that_is_killed_ends_the_run(data: tuple[Plan, Index]) -> None:
    with pytest.raises(RuntimeError, match="killed by signal|exited unexpectedly"):
        load(*data, code=encode_and_die, workers=1)


def test_stopping_early_leaves_no_process_and_no_open_file(data: tuple[Plan, Index]) -> None:
    plan, _ = data
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for workers in (0, 2):
        steps = iter(Loader(plan, encode, rank=0, world=1, workers=workers))
        next(steps)
        assert isinstance(steps, Iterator)
        steps.close()  # type: ignore[attr-defined]
        assert children() == []
        if workers == 0 and open_before:
            assert len(os.listdir("/proc/self/fd")) == open_before


def children() -> list[multiprocessing.process.BaseProcess]:
    return multiprocessing.active_children()


def test_wrong_settings_are_refused(data: tuple[Plan, Index]) -> None:
    plan, index = data
    with pytest.raises(ValueError, match="workers is -1"):
        Loader(plan, encode, rank=0, world=1, workers=-1)
    with pytest.raises(ValueError, match="rank 3 of 2"):
        load(plan, index, rank=3, world=2)
    with pytest.raises(ValueError, match="no place in this plan"):
        load(plan, index, cursor=Cursor(1, 5, 5))


def test_images_of_documents_stay_with_them(tmp_path: Path) -> None:
    documents = [
        Document.caption(image(seed=seed), "a" * (seed + 1), "toys", f"k{seed}")
        for seed in range(6)
    ]
    index = index_of(documents, tmp_path)
    for _, packs in load(plan_of(index), index):
        for pack in packs:
            views = pack.pixels.view(-1, SIDE, SIDE, 3)
            for view, key in zip(views, pack.keys, strict=True):
                expected = encode(documents[int(key[1:])]).pixels[0]
                assert torch.equal(view, torch.from_numpy(expected))


@pytest.mark.parametrize("shared_from", [1, 2**20])
@pytest.mark.parametrize("workers", [0, 2])
def test_views_of_different_sizes_arrive_unchanged(
    tmp_path: Path, workers: int, shared_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_SHARED_FROM", shared_from)
    documents = [
        Document.caption(
            image(5 + seed % 4, 9 - seed % 3, seed), "a" * (seed + 1), "toys", f"k{seed}"
        )
        for seed in range(12)
    ]
    index = index_of(documents, tmp_path)
    steps = load(
        plan_of(index),
        index,
        encode_two_views,
        workers=workers,
        image_bytes=lambda h, w: 3 * (2 * h - 1) * w,
    )
    packs = [pack for _, packs in steps for pack in packs]
    assert {key for pack in packs for key in pack.keys} == {one.key for one in documents}
    assert any(len(set(map(tuple, pack.sizes[::2].tolist()))) > 1 for pack in packs)
    for pack in packs:
        views = [
            view for key in pack.keys for view in encode_two_views(documents[int(key[1:])]).pixels
        ]
        assert pack.sizes.dtype == torch.int32
        assert pack.sizes.tolist() == [list(view.shape[:2]) for view in views]
        assert pack.pixels.numpy().tobytes() == b"".join(view.tobytes() for view in views)


def test_a_document_that_loses_all_its_slices_is_refused_in_the_ledger(
    data: tuple[Plan, Index],
) -> None:
    def fail_on_page(document: Document) -> Sample:
        if document.key == "page0":
            raise DocumentError("no good")
        return encode(document)

    plan, index = data
    ledger = account(plan, plan.end).ledger
    before = (ledger.counts["toys"].used, ledger.counts["toys"].split)
    steps = load(plan, index, fail_on_page)
    ledger.drop(item for _, packs in steps for pack in packs for item in pack.refused)
    counts = ledger.counts["toys"]
    assert (counts.used, counts.split, counts.refused) == (before[0] - 1, before[1] - 1, 1)
    assert [(item.key, item.reason) for item in ledger.refused] == [("page0", "no good")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_listed_twice_gives_each_its_own_words(tmp_path: Path, workers: int) -> None:
    documents = [
        Document((image(), Text("z", variants=(("alt", "a" * n), ("syn", "s" * n)))), "t", f"k{n}")
        for n in range(1, 40)
    ]
    paths = write_shards(documents, tmp_path, "toys", 10).paths
    names = source_names([paths, paths], ["alt", "syn"])
    indexes = [
        build_index(paths, cost, "f", name=name, text=text)
        for name, text in zip(names, ["alt", "syn"], strict=True)
    ]
    assert indexes[0].piece_text.tolist() == indexes[1].piece_text.tolist()
    plan = plan_over(indexes, [0.25, 0.75], epochs=4)
    assert plan.hash != plan_over(indexes[::-1], [0.25, 0.75], epochs=4).hash
    seen: dict[int, list[str]] = {0: [], 1: []}
    for step, packs in Loader(plan, encode, rank=0, world=1, workers=workers):
        for planned, pack in zip(step.packs, packs, strict=True):
            assert pack.refused == []
            at = 0
            for entry in planned.entries:
                ids = pack.input_ids[at : at + entry.tokens].tolist()
                seen[entry.source].append("".join(chr(number - 2) for number in ids[4:-1]))
                at += entry.tokens
    each = range(1, 40)
    assert sorted(seen[0]) == sorted("a" * n for n in each)
    assert sorted(seen[1]) == sorted(3 * ["s" * n for n in each])
