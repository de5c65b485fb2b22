"""Worker processes that answer in the order they were asked, so many bytes ahead and no more.

A job goes to the worker that has least to do. Inside a worker one thread takes jobs, one fetches
what they need, the process itself makes the answers and another thread sends them: waiting for a
disk, computing and sending go on at the same time. In the training process a thread asks and
receives, so that a step finds its answers there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pickle import PicklingError
from queue import Queue, SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol

import torch

from data_packing.shared import receive, send

_END = "end"
_FAILED = "failed"
_ANSWER = "answer"


class Task(Protocol):
    """What workers do; it is pickled once for each of them."""

    def fetch(self, job: Any) -> Any:
        """Get what the job needs from disk; runs beside `make`, in a thread of its own."""

    def make(self, job: Any, fetched: Any) -> Any:
        """Make the answer, which is pickled; a `Block` in it arrives as an array."""


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
        self, jobs: Callable[[], Iterator[tuple[Any, int]]], most: int
    ) -> Generator[Any, None, None]:
        """The answers in the order of the jobs. Left before its end, only `close` may follow.

        Args:
            jobs: makes (job, bytes of its answer); runs in a thread.
            most: bytes of answers that are asked for or waiting; one is asked for in any case.

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
        self.process = context.Process(target=_serve, args=(other, task), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        other.close()
        self.held = 0

    def receive(self) -> Any:
        """The next answer; the worker has sent it, or is dead."""
        try:
            kind, answer = receive(self.connection)
        except (EOFError, OSError) as error:
            self.process.join(5)
            status = self.process.exitcode
            how = f"was killed by signal {-status}" if (status or 0) < 0 else "exited unexpectedly"
            hint = "; most often the machine ran out of memory" if status == -signal.SIGKILL else ""
            raise WorkerError(f"a loader worker {how}{hint}") from error
        if kind == _FAILED:
            raise WorkerError(answer)
        return answer


class _Ahead:
    """The thread that asks ahead and receives."""

    def __init__(
        self, workers: list[_Worker], jobs: Callable[[], Iterator[tuple[Any, int]]], most: int
    ) -> None:
        self.workers, self.jobs, self.most = workers, jobs, most
        self.ready: SimpleQueue[tuple[str, Any, int]] = SimpleQueue()
        self.waiting: deque[tuple[_Worker, int]] = deque()
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

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.ready.put((_FAILED, error, 0))

    def _work(self) -> None:
        jobs = self.jobs()
        following = next(jobs, None)
        while not self.stopped:
            while following is not None and self._room(following[1]) and not self.stopped:
                self._ask(*following)
                following = next(jobs, None)
            if following is None and not self.waiting:
                self.ready.put((_END, None, 0))
                return
            self._receive()

    def _room(self, size: int) -> bool:
        with self.lock:
            return self.held == 0 or self.held + size <= self.most

    def _ask(self, job: Any, size: int) -> None:
        worker = min(self.workers, key=lambda worker: worker.held)
        with self.lock:
            self.held += size
        worker.held += size
        self.waiting.append((worker, size))
        try:
            worker.connection.send(job)
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
            worker, size = self.waiting.popleft()
            answer = worker.receive()
            worker.held -= size
            self.ready.put((_ANSWER, answer, size))


def _serve(connection: Connection, task: Task) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    torch.set_num_threads(1)
    jobs: SimpleQueue[Any] = SimpleQueue()
    fetched: Queue[tuple[Any, Any, str]] = Queue(maxsize=1)
    answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def take() -> None:
        while True:
            jobs.put(connection.recv())

    def fetch() -> None:
        while True:
            job = jobs.get()
            try:
                fetched.put((job, task.fetch(job), ""))
            except Exception as error:
                fetched.put((job, None, _told(error)))

    def give() -> None:
        while True:
            kind, answer = answers.get()
            try:
                send(connection, (kind, answer))
            except (TypeError, AttributeError, PicklingError) as error:
                send(connection, (_FAILED, _told(error)))
            del answer

    for part in (take, fetch, give):
        Thread(target=_until_the_end, args=(part,), daemon=True).start()
    while True:
        job, data, failure = fetched.get()
        if not failure:
            try:
                answers.put((_ANSWER, task.make(job, data)))
                continue
            except Exception as error:
                failure = _told(error)
        answers.put((_FAILED, failure))


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
