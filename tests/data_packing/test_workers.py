from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from data_packing.shared import Lender
from data_packing.workers import Job, Memory, WorkerError, Workers

Jobs = Callable[[], Iterator[Job]]


class Toy:
    """Does what the job says."""

    def fetch(self, job: Any) -> Any:
        if job == "unreadable":
            raise OSError("no such disk")
        if isinstance(job, tuple):
            time.sleep(job[1])
        return 10 * job if isinstance(job, int) else job

    def make(
        self, job: Any, fetched: Any, memory: Memory | None
    ) -> tuple[Any, tuple[int, ...] | None]:
        if job == "large":
            assert memory is not None
            array = memory[:3_000_000].reshape(1000, 3000)
            array[:] = np.arange(3000) % 251
            return np.arange(100_000), array.shape
        return self.made(job, fetched), None

    def made(self, job: Any, fetched: Any) -> Any:
        if job == "bug":
            raise KeyError("a bug")
        if job == "die":
            os._exit(3)
        if job == "function":
            return lambda: 0
        if job == "who":
            return os.getpid(), torch.get_num_threads()
        return fetched


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    both = Workers(Toy(), 2, __name__)
    yield both
    both.close()
    assert multiprocessing.active_children() == []


def asked(workers: Workers, made: Jobs, most: int) -> list[Any]:
    return [answer for answer, _ in workers.answers(made, most)]


def jobs(values: list[Any], size: int = 1) -> Jobs:
    return lambda: iter([Job(value, size) for value in values])


@pytest.mark.parametrize("most", [1, 7, 10_000])
def test_answers_come_in_the_order_of_the_jobs(workers: Workers, most: int) -> None:
    slow = [("slow", 0.0 if number % 7 else 0.02) for number in range(40)]
    assert asked(workers, jobs(slow), most) == slow
    assert asked(workers, jobs(list(range(300))), most) == list(range(0, 3000, 10))
    assert asked(workers, jobs([]), most) == []


def test_both_workers_work_and_each_with_one_thread(workers: Workers) -> None:
    found = asked(workers, jobs(["who"] * 50), 10)
    assert len({pid for pid, _ in found}) == 2
    assert {threads for _, threads in found} == {1}
    assert os.getpid() not in {pid for pid, _ in found}


def test_no_more_bytes_are_asked_for_than_allowed(workers: Workers) -> None:
    jobs_taken: list[int] = []

    def watched() -> Iterator[Job]:
        for number in range(60):
            yield Job(number, 10 + number % 3)
            jobs_taken.append(10 + number % 3)

    taken = 0
    for at, _ in enumerate(workers.answers(watched, 100)):
        time.sleep(0.002)
        taken += 10 + at % 3
        assert sum(jobs_taken) - taken <= 100
        if at == 30:
            time.sleep(0.2)
            assert sum(jobs_taken) - taken > 80, "there is room for more, and time was enough"
    assert len(jobs_taken) == 60


def test_a_job_larger_than_allowed_is_done_alone(workers: Workers) -> None:
    assert asked(workers, jobs([1, 2, 3], size=1000), 10) == [10, 20, 30]


def test_large_arrays_arrive_whole_and_stay_while_anybody_looks_at_them() -> None:
    one = Workers(Toy(), 1, __name__)
    before = len(os.listdir("/proc/self/fd"))
    try:
        kept: deque[np.ndarray] = deque(maxlen=4)
        for small, large in one.answers(lambda: (Job("large", 1, 3_500_000) for _ in range(30)), 3):
            assert np.array_equal(small, np.arange(100_000))
            assert large is not None
            assert large.shape == (1000, 3000)
            assert (large == np.arange(3000) % 251).all()
            large[:] = 7
            kept.append(large[5, :10])
        assert all((view == 7).all() for view in kept)
        assert len(os.listdir("/proc/self/fd")) < before + 2 * (4 + 3 + 4) + 4
    finally:
        one.close()


def test_memory_comes_back_when_its_array_is_forgotten() -> None:
    lender = Lender()
    block = lender.lend(1000)
    view = lender.array(block, (10, 20))[3, :5]
    assert lender.lend(1000) is not block
    del view
    assert lender.lend(10_000) is not block
    assert lender.lend(900) is block
    lender.back(block)
    assert lender.lend(100) is not block, "far too large"
    assert lender.lend(501) is block


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
        made = one.answers(jobs([1, job, 2]), 100)
        assert next(made) == (10, None)
        with pytest.raises(WorkerError, match=message):
            list(made)
    finally:
        one.close()


def test_a_failure_of_the_jobs_is_the_callers() -> None:
    def bad() -> Iterator[Job]:
        yield Job(1, 1)
        raise LookupError("no plan")

    one = Workers(Toy(), 1, __name__)
    try:
        with pytest.raises(LookupError, match="no plan"):
            asked(one, bad, 10)
    finally:
        one.close()


def test_a_worker_that_leaves_is_an_error() -> None:
    one = Workers(Toy(), 1, __name__)
    try:
        with pytest.raises(WorkerError, match="exited unexpectedly"):
            asked(one, jobs([1, 2, "die", 3]), 100)
    finally:
        one.close()


def test_waiting_for_a_disk_does_not_keep_the_process_from_computing() -> None:
    one = Workers(Busy(), 1, __name__)
    try:
        next(one.answers(jobs([0]), 1))
        start = time.monotonic()
        asked(one, jobs([0] * 20), 100)
        assert time.monotonic() - start < 1.7  # one after the other would take two seconds
    finally:
        one.close()


class Busy:
    """Reads for a while, computes for a while."""

    def fetch(self, job: Any) -> None:
        time.sleep(0.05)

    def make(self, job: Any, fetched: Any, memory: Memory | None) -> tuple[None, None]:
        time.sleep(0.05)
        return None, None
