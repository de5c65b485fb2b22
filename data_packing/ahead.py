"""Things that are made when they are asked for, and the next one while the last is still in use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Ahead(Generic[K, V]):
    """The last few things by key; any thread may ask.

    Args:
        make: makes the thing of a key.
        keep: how many are kept, those that were asked for last.
    """

    def __init__(self, make: Callable[[K], V], keep: int = 2) -> None:
        self._make, self._keep = make, keep
        self._made: OrderedDict[K, Future[V]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: K) -> V:
        """The thing of a key: kept, waited for, or made now.

        Raises:
            BaseException: whatever making it raised, here or in the background.
        """
        while True:
            future, mine = self._claim(key)
            if mine:
                self._run(key, future)
            try:
                return future.result()
            except InterruptedError:
                if mine:
                    raise  # otherwise it was given up in the background, before anybody asked

    def prepare(self, key: K) -> None:
        """Make the thing of a key in the background, unless it is there."""
        future, mine = self._claim(key)
        if mine:
            Thread(target=self._run, args=(key, future), daemon=True).start()

    def _claim(self, key: K) -> tuple[Future[V], bool]:
        with self._lock:
            known = key in self._made
            future = self._made.setdefault(key, Future())
            self._made.move_to_end(key)
            while len(self._made) > self._keep:
                self._made.popitem(last=False)
        return future, not known

    def _run(self, key: K, future: Future[V]) -> None:
        try:
            future.set_result(self._make(key))
        except BaseException as error:
            with self._lock:
                if self._made.get(key) is future:
                    del self._made[key]  # who asks again may be luckier
            future.set_exception(error)
