"""The packing rule: arrival order, then an exact subset-sum for the room that is left.

A pack takes documents as they come until about eight mean lengths of room remain. Which of the next
few documents fill that room best is a subset-sum problem, and the set of sums that can be reached
fits into the bits of one Python integer: adding a document of length n is `sums |= sums << n`.
The oldest document goes first into every pack, so none waits for more than `window` packs. There is
no sort and no global pass: documents stay near their place, and nothing but lengths is needed.

Where a pack holds fewer than about four documents, a window sees too few to find each large one its
partner. There the largest waiting document goes first (the oldest when it has waited long), and the
result is kept only if best-fit-decreasing over all documents needs as many packs or more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TAIL = 8
"""Mean lengths of room at which a pack stops taking documents in order."""

FEW = 4
"""Mean lengths of capacity below which the largest document goes first."""

PATIENCE = 16
"""Packs after which the oldest document goes first all the same."""

Lengths = Sequence[int] | NDArray[np.integer]


def pack_lengths(
    lengths: Lengths,
    capacity: int,
    *,
    second: Lengths | None = None,
    second_capacity: int | None = None,
    max_documents: int | None = None,
    window: int = 64,
) -> list[list[int]]:
    """Group documents into packs that hold at most `capacity`.

    Args:
        lengths: what each document takes of the first resource (tokens), at least 1 each.
        capacity: how much of it a pack holds.
        second, second_capacity: the same for a second resource (vision patches); give both or
            neither. A document may take 0 of it.
        max_documents: the most documents in one pack.
        window: how many waiting documents the tail chooses from.

    Returns:
        The packs, each a list of ascending positions in `lengths`; every position is in exactly
        one pack. The same input gives the same packs on every machine (whole numbers only).

    Raises:
        ValueError: a document that fits no pack, or arguments that make no sense.
    """
    capacity, window = _limit("capacity", capacity), _limit("window", window)
    if second_capacity is not None:
        second_capacity = _limit("second_capacity", second_capacity)
    if max_documents is not None:
        max_documents = _limit("max_documents", max_documents)
    first = _checked("length", lengths, capacity, minimum=1)
    if (second is None) != (second_capacity is None):
        raise ValueError("second and second_capacity belong together: give both or neither")
    other = None
    if second is not None and second_capacity is not None:
        other = _checked("second length", second, second_capacity, minimum=0)
        if len(other) != len(first):
            raise ValueError(f"{len(first)} lengths but {len(other)} second lengths")
        if sum(other) == 0:
            other = None
    packer = _Packer(first, capacity, other, second_capacity or 0, max_documents, window)
    if not packer.few:
        return packer.run()
    decreasing = _best_fit_decreasing(first, capacity)
    allowed = packer.allows(decreasing)
    if allowed and len(decreasing) * capacity - sum(first) < capacity:
        return decreasing  # nothing can need fewer
    packs = packer.run()
    return decreasing if allowed and len(decreasing) < len(packs) else packs


def _limit(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")
    return int(value)


def _checked(name: str, values: Lengths, capacity: int, minimum: int) -> list[int]:
    array = np.asarray(values)
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}s must be whole numbers in one row, not {array.dtype} array")
    worst = int(array.argmax())
    if array[worst] > capacity:
        raise ValueError(
            f"document {worst} has {name} {array[worst]}, more than the capacity {capacity}; "
            "split or refuse it before packing"
        )
    least = int(array.argmin())
    if array[least] < minimum:
        raise ValueError(
            f"document {least} has {name} {array[least]}; it must be {minimum} or more"
        )
    result: list[int] = array.tolist()
    return result


def _best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Largest first, each into the fullest pack that takes it; packs in the order of their middle.

    It knows one resource only, so the caller checks the other limits.
    """
    rooms: list[tuple[int, int]] = []  # (room left, pack), ascending
    packs: list[list[int]] = []
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[index]
        at = bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, pack = rooms.pop(at)
            packs[pack].append(index)
        else:
            room, pack = capacity, len(packs)
            packs.append([index])
        if room > length:
            insort(rooms, (room - length, pack))
    for members in packs:
        members.sort()
    packs.sort(key=lambda members: (members[len(members) // 2], members))
    return packs


class _Packer:
    """The state of one run: the documents passed over so far, and how far the stream was read."""

    def __init__(
        self,
        lengths: list[int],
        capacity: int,
        second: list[int] | None,
        second_capacity: int,
        max_documents: int | None,
        window: int,
    ) -> None:
        self.lengths = lengths
        self.capacity = capacity
        self.second = second
        self.second_capacity = second_capacity
        self.max_documents = max_documents or len(lengths)
        self.window = window
        mean = sum(lengths) / max(1, len(lengths))
        self.tail_room = int(TAIL * mean)
        self.few = capacity < FEW * mean
        self.waiting: list[int] = []
        self.next = 0
        self.oldest = -1
        self.passed_over = 0

    def run(self) -> list[list[int]]:
        packs = []
        while self.waiting or self.next < len(self.lengths):
            pack, room, second_room = self._take_largest() if self.few else self._take_in_order()
            self._refill()
            if room and self.waiting and len(pack) < self.max_documents:
                chosen = self._choose(room, second_room, self.max_documents - len(pack))
                if chosen:
                    pack.extend(chosen)
                    taken = set(chosen)
                    self.waiting = [index for index in self.waiting if index not in taken]
            pack.sort()
            packs.append(pack)
        return packs

    def allows(self, packs: list[list[int]]) -> bool:
        """Whether packs made for the first resource keep the other limits."""
        second = self.second
        return max(map(len, packs)) <= self.max_documents and (
            second is None
            or all(sum(second[at] for at in pack) <= self.second_capacity for pack in packs)
        )

    def _refill(self) -> None:
        missing = self.window - len(self.waiting)
        if missing > 0 and self.next < len(self.lengths):
            stop = min(len(self.lengths), self.next + missing)
            self.waiting.extend(range(self.next, stop))
            self.next = stop

    def _take_largest(self) -> tuple[list[int], int, int]:
        """Start a pack with the waiting document that is hardest to place."""
        self._refill()
        lengths, waiting = self.lengths, self.waiting
        if waiting[0] != self.oldest:
            self.oldest, self.passed_over = waiting[0], 0
        self.passed_over += 1
        at = 0
        if self.passed_over <= PATIENCE:
            waiting_lengths = [lengths[index] for index in waiting]
            at = waiting_lengths.index(max(waiting_lengths))
        index = waiting.pop(at)
        second_room = self.second_capacity - (self.second[index] if self.second else 0)
        return [index], self.capacity - lengths[index], second_room

    def _take_in_order(self) -> tuple[list[int], int, int]:
        """Start a pack with the oldest document, and go on in order while there is much room."""
        lengths, second, waiting = self.lengths, self.second, self.waiting
        room, second_room = self.capacity, self.second_capacity
        pack: list[int] = []
        used, total = 0, len(lengths)
        while len(pack) < self.max_documents and (room > self.tail_room or not pack):
            if used < len(waiting):
                index = waiting[used]
            elif self.next < total:
                index = self.next
            else:
                break
            if lengths[index] > room or (second is not None and second[index] > second_room):
                break
            if used < len(waiting):
                used += 1
            else:
                self.next += 1
            pack.append(index)
            room -= lengths[index]
            if second is not None:
                second_room -= second[index]
        del waiting[:used]
        return pack, room, second_room

    def _choose(self, room: int, second_room: int, documents: int) -> list[int]:
        """Choose waiting documents that fill `room` best within the other limits."""
        second = self.second
        if second is None:
            candidates = self.waiting
        else:
            candidates = [index for index in self.waiting if second[index] <= second_room]
        chosen = self._fill(candidates, room)
        if second is not None and sum(second[index] for index in chosen) > second_room:
            chosen = self._fill_both(candidates, room, second_room)
        if len(chosen) > documents:
            chosen = self._largest_first(candidates, room, second_room, documents)
        return chosen

    def _fill(self, candidates: list[int], room: int) -> list[int]:
        """Subset-sum on the first resource; of equal fills the one with the oldest documents."""
        lengths = self.lengths
        full = 1 << room
        below = full - 1
        sums = 1  # bit n is set when some candidates seen so far add up to n
        history = [1]
        for index in candidates:
            length = lengths[index]
            if length <= room:
                # Sums above the room are dropped before the shift, so integers stay small.
                sums |= (sums & (below >> (length - 1))) << length
            history.append(sums)
            if sums >= full:
                break
        left = sums.bit_length() - 1
        chosen = []
        for number in range(len(history) - 2, -1, -1):
            if left == 0:
                break
            if not history[number] >> left & 1:
                index = candidates[number]
                chosen.append(index)
                left -= lengths[index]
        return chosen

    def _fill_both(self, candidates: list[int], room: int, second_room: int) -> list[int]:
        """The same, under the second limit: for every sum the least of the second resource."""
        assert self.second is not None
        unreachable = second_room + 1
        least = np.full(room + 1, unreachable, dtype=np.int64)
        least[0] = 0
        history = []
        for index in candidates:
            length = self.lengths[index]
            history.append(least)
            if length <= room:
                grown = least.copy()
                np.minimum(least[length:], least[:-length] + self.second[index], out=grown[length:])
                least = grown
        left = int(np.flatnonzero(least <= second_room)[-1])
        budget = int(least[left])
        chosen = []
        for number in range(len(history) - 1, -1, -1):
            if history[number][left] > budget:
                index = candidates[number]
                chosen.append(index)
                left -= self.lengths[index]
                budget -= self.second[index]
        return chosen

    def _largest_first(
        self, candidates: list[int], room: int, second_room: int, documents: int
    ) -> list[int]:
        """Fill with few documents: the largest that fits, again and again."""
        chosen: list[int] = []
        for index in sorted(candidates, key=lambda at: (-self.lengths[at], at)):
            if len(chosen) == documents:
                break
            patches = self.second[index] if self.second is not None else 0
            if self.lengths[index] <= room and patches <= second_room:
                chosen.append(index)
                room -= self.lengths[index]
                second_room -= patches
        return chosen
