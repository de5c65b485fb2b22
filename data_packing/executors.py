"""The same work on many things: in this process, in several, or on a Ray cluster.

Passes over shards (counting tokens, looking for defects) are functions of one shard or a part of
one. Here they are handed to whoever does them; the results come in the order of the things.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, TypeVar

EXECUTORS = ("local", "ray")

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Executor:
    """Who does the work.

    Attributes:
        name: "local" for processes of this machine, "ray" for the cluster that `ray.init` finds
            (`RAY_ADDRESS`, or the one of this machine; without any it starts one).
        workers: local processes; 0 or 1 works in this one. With Ray the most tasks at a time, 0
            for as many as the cluster has processors.
    """

    name: str = "local"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.name not in EXECUTORS:
            raise ValueError(f"unknown executor {self.name!r}; valid: {', '.join(EXECUTORS)}")

    def each(self, work: Callable[[A], B], things: Sequence[A]) -> Iterator[B]:
        """Yield what `work` gives for each thing, in order.

        Args:
            work: picklable, with what it needs; the things too.

        Raises:
            ValueError: a worker was killed, or Ray is not installed.
            Exception: whatever `work` raises.
        """
        if self.name == "ray":
            return _ray(work, things, self.workers)
        if self.workers <= 1 or len(things) <= 1:
            return (work(thing) for thing in things)
        return _processes(work, things, self.workers)


HERE = Executor()
"""This process."""


def _processes(work: Callable[[A], B], things: Sequence[A], workers: int) -> Iterator[B]:
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(things)), context, initializer=_begin, initargs=(work,)
    )
    try:
        yield from pool.map(_run, things)
    except BrokenProcessPool:
        raise ValueError(
            "a worker was killed, most likely for want of memory; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_work: Callable[[Any], Any] | None = None


def _begin(work: Callable[[Any], Any]) -> None:
    """Keep the work in the worker: sent once, not with everything."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End when the parent is gone: killed, it ends no pool, and nobody else would."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run(thing: Any) -> Any:
    assert _work is not None
    return _work(thing)


def _ray(work: Callable[[A], B], things: Sequence[A], workers: int) -> Iterator[B]:
    """Through Ray Data. What `work` raises comes back as a value, so that it keeps its type."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--executor ray needs Ray: pip install 'mllm[ray]'") from error
    # Its usage poller never ends and formats a traceback every ten seconds, which parses source;
    # CPython 3.11.7 can fail when two threads parse at once (its issue 106905).
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def one(row: dict[str, Any]) -> dict[str, Any]:
        result: tuple[bool, Any]
        try:
            result = (True, work(pickle.loads(row["thing"])))  # what this process pickled
        except Exception as error:
            result = (False, error)
        return {"number": row["number"], "result": pickle.dumps(result)}

    rows = [{"number": at, "thing": pickle.dumps(thing)} for at, thing in enumerate(things)]
    if not rows:
        return
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    waiting: dict[int, Any] = {}
    after = 0
    for row in data.map(one, concurrency=workers or None).iter_rows():
        waiting[row["number"]] = pickle.loads(row["result"])
        while after in waiting:
            good, result = waiting.pop(after)
            if not good:
                raise result
            yield result
            after += 1
