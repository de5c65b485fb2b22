"""Memory that two processes share, used again and again.

Fresh shared memory is slow: the system clears every page and hands it out one by one, which takes
half as long as decoding the images that go there. So the process that receives keeps blocks, lends
one with every job and takes it back when nobody refers to its array any more. A block has no name
(memfd): its file descriptor goes through the socket, no file lies in /dev/shm (which is small in
containers) and nothing is left behind.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from math import prod

import numpy as np
from numpy.typing import NDArray

AVAILABLE = hasattr(os, "memfd_create")
"""Whether this system has such memory."""

_SPARE = 4  # blocks kept while nobody needs them


class Block:
    """A piece of shared memory, `size` bytes of it.

    Args:
        handle: its file descriptor, which is the block's from now on.
        size: in bytes.
        fill: map all of it at once, because all of it will be written.
    """

    def __init__(self, handle: int, size: int, fill: bool = False) -> None:
        self.handle, self.size = handle, size
        flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if fill else 0)
        self.memory = mmap.mmap(handle, size, flags=flags)

    def close(self) -> None:
        """Close the file descriptor; arrays keep the memory."""
        os.close(self.handle)


class Lender:
    """The blocks of a process: lent with a job, back when the array of its answer is forgotten."""

    def __init__(self) -> None:
        self._free: deque[Block] = deque()

    def lend(self, size: int) -> Block:
        """A block of at least this size, and not much larger."""
        for _ in range(len(self._free)):
            block = self._free.popleft()
            if size <= block.size <= 2 * size:
                return block
            self._free.append(block)
        while len(self._free) > _SPARE:
            self._free.popleft().close()
        handle = os.memfd_create("pack", os.MFD_CLOEXEC)
        os.ftruncate(handle, size)
        return Block(handle, size)

    def array(self, block: Block, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """What lies in a block; the block is free again when no array or view of it is left."""
        flat = np.frombuffer(block.memory, dtype=np.uint8, count=prod(shape))
        weakref.finalize(flat, self._free.append, block).atexit = False
        return flat.reshape(shape)

    def back(self, block: Block) -> None:
        """Take back a block that was not used."""
        self._free.append(block)

    def close(self) -> None:
        """Close the blocks that are free."""
        while self._free:
            self._free.popleft().close()
