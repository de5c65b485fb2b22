"""Worker processes that answer in the order they were asked, so many bytes ahead and no more.

A job goes to the worker that has least to do. Inside a worker one thread takes jobs, one fetches
what they need, the process itself makes the answers and another thread sends them: waiting for a
disk, computing and sending go on at the same time. In the training process a thread asks and
receives, so that a step finds its answers there.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.reduction import recv_handle, send_handle
from pickle import PicklingError
from queue import Queue, SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_packing.shared import AVAILABLE, Block, Lender

_END = "end"
_FAILED = "failed"
_ANSWER = "answer"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


Memory = NDArray[np.uint8]
Shape = tuple[int, ...]


class Job(NamedTuple):
    """What a worker is asked.

    Attributes:
        work: goes to the task.
        size: bytes of the answer, as far as they count.
        shared: bytes of the one large array in it, which gets shared memory; 0 for none.
    """

    work: Any
    size: int
    shared: int = 0


class Task(Protocol):
    """What workers do; it is pickled once for each of them."""

    def fetch(self, work: Any) -> Any:
        """Get what the job needs from disk; runs beside `make`, in a thread of its own."""

    def make(self, work: Any, fetched: Any, memory: Memory | None) -> tuple[Any, Shape | None]:
        """Make the answer, which is pickled, and fill the shared memory of the job, if it has any.

        Returns:
            The answer; and the shape of the array at the start of the memory, None if it was not
            used.
        """


class WorkerError(RuntimeError):
    """A worker failed or died."""


class Workers:
    """Processes that share one task.

    They are started by a fork server, not forked from this process: a training process has threads
    (gloo, NCCL, autograd), and a fork copies their locks but not the threads.

    Args:
        task: what each does.
        count: processes.
        preload: a module that the fork server imports once for all of them.
    """

    def __init__(self, task: Task, count: int, preload: str) -> None:
        context = _context(preload)
        self._workers = [_Worker(context, task) for _ in range(count)]

    def answers(
        self, jobs: Callable[[], Iterator[Job]], most: int
    ) -> Generator[tuple[Any, Memory | None], None, None]:
        """The answers in the order of the jobs. Left before its end, only `close` may follow.

        Args:
            jobs: makes the jobs; runs in a thread.
            most: bytes of answers that are asked for or waiting; one is asked for in any case.

        Yields:
            The answer, and the array that the task made in shared memory.

        Raises:
            WorkerError: `fetch` or `make` failed, or a worker died.
            Exception: what `jobs` raised.
        """
        assert not any(worker.held for worker in self._workers), "left before its end"
        ahead = _Ahead(self._workers, jobs, most)
        try:
            while True:
                kind, answer = ahead.take()
                if kind == _END:
                    return
                if kind == _FAILED:
                    raise answer
                yield answer
        finally:
            ahead.stop()

    def close(self) -> None:
        """End the processes, whatever they do."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
            worker.process.close()


def _context(preload: str) -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


class _Worker:
    """A worker as this process sees it; `held` are the bytes it was asked for and not yet gave."""

    def __init__(self, context: BaseContext, task: Task) -> None:
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, task, _handled()), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        other.close()
        self.held = 0

    def receive(self) -> tuple[Any, Shape | None]:
        """The next answer; the worker has sent it, or is dead."""
        try:
            kind, answer, shape = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            status = self.process.exitcode
            how = f"was killed by signal {-status}" if (status or 0) < 0 else "exited unexpectedly"
            hint = "; most often the machine ran out of memory" if status == -signal.SIGKILL else ""
            raise WorkerError(f"a loader worker {how}{hint}") from error
        if kind == _FAILED:
            raise WorkerError(answer)
        return answer, shape


class _Ahead:
    """The thread that asks ahead and receives."""

    def __init__(
        self, workers: list[_Worker], jobs: Callable[[], Iterator[Job]], most: int
    ) -> None:
        self.workers, self.jobs, self.most = workers, jobs, most
        self.ready: SimpleQueue[tuple[str, Any, int]] = SimpleQueue()
        self.waiting: deque[tuple[_Worker, int, Block | None]] = deque()
        self.lender = Lender()
        self.held, self.stopped = 0, False
        self.lock = Lock()
        self.woken, self.wake = multiprocessing.Pipe(duplex=False)
        self.thread = Thread(target=self._run, daemon=True)
        self.thread.start()

    def take(self) -> tuple[str, Any]:
        """The next answer, an exception or the end; makes room for more."""
        kind, answer, size = self.ready.get()
        with self.lock:
            self.held -= size
        if kind == _ANSWER:
            self.wake.send_bytes(b".")
        return kind, answer

    def stop(self) -> None:
        """End the thread."""
        self.stopped = True
        self.wake.send_bytes(b".")
        self.thread.join()
        self.wake.close()
        self.woken.close()
        self.lender.close()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.ready.put((_FAILED, error, 0))

    def _work(self) -> None:
        jobs = self.jobs()
        following = next(jobs, None)
        while not self.stopped:
            while following is not None and self._room(following.size) and not self.stopped:
                self._ask(following)
                following = next(jobs, None)
            if following is None and not self.waiting:
                self.ready.put((_END, None, 0))
                return
            self._receive()

    def _room(self, size: int) -> bool:
        with self.lock:
            return self.held == 0 or self.held + size <= self.most

    def _ask(self, job: Job) -> None:
        worker = min(self.workers, key=lambda worker: worker.held)
        with self.lock:
            self.held += job.size
        worker.held += job.size
        block = self.lender.lend(job.shared) if job.shared and AVAILABLE else None
        self.waiting.append((worker, job.size, block))
        try:
            worker.connection.send((job.work, 0 if block is None else block.size))
            if block is not None:
                send_handle(worker.connection, block.handle, worker.process.pid)
        except OSError:
            worker.receive()  # it is dead: says how

    def _receive(self) -> None:
        """Wait for the next answer, or until one was taken."""
        places: list[Any] = [self.woken]
        if self.waiting:
            places.append(self.waiting[0][0].connection)
        ready = wait(places)
        if self.woken in ready:
            self.woken.recv_bytes()
        if len(ready) == 2 or self.woken not in ready:
            worker, size, block = self.waiting.popleft()
            answer, shape = worker.receive()
            worker.held -= size
            self.ready.put((_ANSWER, (answer, self._array(block, shape)), size))

    def _array(self, block: Block | None, shape: Shape | None) -> Memory | None:
        if block is not None and shape is None:
            self.lender.back(block)
        return None if block is None or shape is None else self.lender.array(block, shape)


def _handled() -> tuple[int, ...]:
    """Signals that this process answers itself: launchers send them to its workers too."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    return tuple(number for number in numbers if callable(signal.getsignal(number)))


def _serve(connection: Connection, task: Task, ignored: tuple[int, ...]) -> None:
    """The life of a worker process."""
    for number in (signal.SIGINT, *ignored):  # Ctrl-C is for the process that trains
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    _keep_freed_memory()
    jobs: SimpleQueue[tuple[Any, Block | None]] = SimpleQueue()
    fetched: Queue[tuple[Any, Block | None, Any, str]] = Queue(maxsize=1)
    answers: SimpleQueue[tuple[str, Any, Shape | None]] = SimpleQueue()

    def take() -> None:
        while True:
            work, size = connection.recv()
            block = Block(recv_handle(connection), size, fill=True) if size else None
            jobs.put((work, block))

    def fetch() -> None:
        while True:
            work, block = jobs.get()
            try:
                fetched.put((work, block, task.fetch(work), ""))
            except Exception as error:
                fetched.put((work, block, None, _told(error)))

    def give() -> None:
        while True:
            kind, answer, shape = answers.get()
            try:
                connection.send((kind, answer, shape))
            except (TypeError, AttributeError, PicklingError) as error:
                connection.send((_FAILED, _told(error), None))

    for part in (take, fetch, give):
        Thread(target=_until_the_end, args=(part,), daemon=True).start()
    while True:
        work, block, data, failure = fetched.get()
        if not failure:
            try:
                answers.put((_ANSWER, *_made(task, work, data, block)))
                continue
            except Exception as error:
                failure = _told(error)
        answers.put((_FAILED, failure, None))


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: images come and go, and fresh pages are slow."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 1024 * 1024)
        libc.mallopt(_TRIM_THRESHOLD, 256 * 1024 * 1024)


def _made(task: Task, work: Any, data: Any, block: Block | None) -> tuple[Any, Shape | None]:
    if block is None:
        return task.make(work, data, None)
    try:
        return task.make(work, data, np.frombuffer(block.memory, dtype=np.uint8))
    finally:
        block.close()


def _until_the_end(part: Callable[[], None]) -> None:
    """Run a part of a worker; when the training process is gone, so is the worker."""
    try:
        part()
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _told(error: BaseException) -> str:
    """The message, and below it where the worker was."""
    return f"{error}\n\nin a loader worker:\n{''.join(traceback.format_exception(error))}"
