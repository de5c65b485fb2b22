from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from data_packing.shared import Block
from data_packing.workers import WorkerError, Workers

Jobs = Callable[[], Iterator[tuple[Any, int]]]


class Toy:
    """Does what the job says."""

    def fetch(self, job: Any) -> Any:
        if job == "unreadable":
            raise OSError("no such disk")
        if isinstance(job, tuple):
            time.sleep(job[1])
        return 10 * job if isinstance(job, int) else job

    def make(self, job: Any, fetched: Any) -> Any:
        if job == "bug":
            raise KeyError("a bug")
        if job == "die":
            os._exit(3)
        if job == "function":
            return lambda: 0
        if job == "large":
            block = Block((1000, 3000))
            block.array[:] = np.arange(3000) % 251
            return block, np.arange(100_000)
        if job == "who":
            return os.getpid(), torch.get_num_threads()
        return fetched


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    both = Workers(Toy(), 2, __name__)
    yield both
    both.close()
    assert multiprocessing.active_children() == []


def jobs(values: list[Any], size: int = 1) -> Jobs:
    return lambda: iter([(value, size) for value in values])


@pytest.mark.parametrize("most", [1, 7, 10_000])
def test_answers_come_in_the_order_of_the_jobs(workers: Workers, most: int) -> None:
    slow = [("slow", 0.0 if number % 7 else 0.02) for number in range(40)]
    assert list(workers.answers(jobs(slow), most)) == slow
    assert list(workers.answers(jobs(list(range(300))), most)) == list(range(0, 3000, 10))
    assert list(workers.answers(jobs([]), most)) == []


def test_both_workers_work_and_each_with_one_thread(workers: Workers) -> None:
    found = list(workers.answers(jobs(["who"] * 50), 10))
    assert len({pid for pid, _ in found}) == 2
    assert {threads for _, threads in found} == {1}
    assert os.getpid() not in {pid for pid, _ in found}


def test_no_more_bytes_are_asked_for_than_allowed(workers: Workers) -> None:
    asked: list[int] = []

    def watched() -> Iterator[tuple[Any, int]]:
        for number in range(60):
            yield number, 10 + number % 3  # a job is taken from here once there is room before it
            asked.append(10 + number % 3)

    taken = 0
    for at, _ in enumerate(workers.answers(watched, 100)):
        time.sleep(0.002)
        taken += 10 + at % 3
        assert sum(asked) - taken <= 100
        if at == 30:
            time.sleep(0.2)
            assert sum(asked) - taken > 80, "there is room for more, and time was enough"
    assert len(asked) == 60


def test_a_job_larger_than_allowed_is_done_alone(workers: Workers) -> None:
    assert list(workers.answers(jobs([1, 2, 3], size=1000), 10)) == [10, 20, 30]


def test_large_answers_arrive_whole(workers: Workers) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for shared, array in list(workers.answers(jobs(["large"] * 6), 3)):
        assert (shared == np.arange(3000) % 251).all()
        assert shared.shape == (1000, 3000)
        shared[0, 0] = 7
        assert np.array_equal(array, np.arange(100_000))
    del shared
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("bug", r"KeyError: 'a bug'"),
        ("unreadable", "no such disk"),
        ("function", "Can't (pickle|get local)"),
    ],
)
def test_a_failure_comes_in_its_turn_and_says_where(job: str, message: str) -> None:
    one = Workers(Toy(), 1, __name__)
    try:
        answers = one.answers(jobs([1, job, 2]), 100)
        assert next(answers) == 10
        with pytest.raises(WorkerError, match=message):
            list(answers)
    finally:
        one.close()


def test_a_failure_of_the_jobs_is_the_callers() -> None:
    def bad() -> Iterator[tuple[Any, int]]:
        yield 1, 1
        raise LookupError("no plan")

    one = Workers(Toy(), 1, __name__)
    try:
        with pytest.raises(LookupError, match="no plan"):
            list(one.answers(bad, 10))
    finally:
        one.close()


def test_a_worker_that_leaves_is_an_error() -> None:
    one = Workers(Toy(), 1, __name__)
    try:
        with pytest.raises(WorkerError, match="exited unexpectedly"):
            list(one.answers(jobs([1, 2, "die", 3]), 100))
    finally:
        one.close()


def test_waiting_for_a_disk_does_not_keep_the_process_from_computing() -> None:
    one = Workers(Busy(), 1, __name__)
    try:
        next(one.answers(jobs([0]), 1))
        start = time.monotonic()
        list(one.answers(jobs([0] * 10), 100))
        assert time.monotonic() - start < 0.85  # one after the other would take a second
    finally:
        one.close()


class Busy:
    """Reads for a while, computes for a while."""

    def fetch(self, job: Any) -> None:
        time.sleep(0.05)

    def make(self, job: Any, fetched: Any) -> None:
        time.sleep(0.05)
