from __future__ import annotations

import threading

import pytest

from data_packing.ahead import Ahead


def test_things_are_made_once_and_the_last_are_kept() -> None:
    made: list[int] = []
    ahead = Ahead(lambda key: made.append(key) or key * 10, keep=2)
    assert [ahead.get(key) for key in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert made == [1, 2, 3, 2]  # 2 was asked for longer ago than 1 when 3 came


def test_what_is_prepared_is_made_elsewhere_and_waited_for() -> None:
    begin, places = threading.Event(), []

    def make(key: str) -> str:
        assert begin.wait(30)
        places.append(threading.current_thread())
        return key

    ahead = Ahead(make)
    ahead.prepare("a")
    ahead.prepare("a")
    begin.set()
    assert ahead.get("a") == "a"
    assert len(places) == 1
    assert places[0] is not threading.current_thread()


def test_what_fails_is_raised_where_it_is_asked_for_and_tried_again() -> None:
    broken = [ValueError("no such shard"), ValueError("still none")]

    def make(key: int) -> int:
        if broken:
            raise broken.pop(0)
        return key

    ahead = Ahead(make)
    for message in ("no such shard", "still none"):
        with pytest.raises(ValueError, match=message):
            ahead.get(7)
    assert ahead.get(7) == 7


def test_what_was_given_up_in_the_background_is_made_by_who_asks() -> None:
    here = threading.current_thread()
    begun, go = threading.Event(), threading.Event()

    def make(key: int) -> int:
        if threading.current_thread() is not here:
            begun.set()
            assert go.wait(30)
            raise InterruptedError
        return key

    ahead = Ahead(make)
    ahead.prepare(5)
    assert begun.wait(30)
    threading.Timer(0.1, go.set).start()
    assert ahead.get(5) == 5
