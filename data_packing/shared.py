"""Messages between processes of one machine, with large arrays that are not copied on the way.

An array lies in memory without a name (memfd), whose file descriptor goes through the socket: no
file in /dev/shm, which is small in containers, and nothing to clean up. Where the system has no
such memory, arrays go through the socket like everything else.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from math import prod
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

AVAILABLE = hasattr(os, "memfd_create")


class Block:
    """A uint8 array in memory that can be given to another process.

    Args:
        shape: of the array.
        handle: the file descriptor of a block from another process; None makes a new one.

    Attributes:
        array: uint8 [*shape]; the memory lives as long as it does.
    """

    def __init__(self, shape: tuple[int, ...], handle: int | None = None) -> None:
        self.shape, size = shape, prod(shape)
        if handle is None:
            self.handle = os.memfd_create("pack", os.MFD_CLOEXEC)
            os.ftruncate(self.handle, size)
        else:
            self.handle = handle
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        memory = mmap.mmap(self.handle, size, flags=flags)
        self.array: NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8).reshape(shape)

    def close(self) -> None:
        """Close the file descriptor; the array stays."""
        os.close(self.handle)


def send(connection: Connection, value: Any) -> None:
    """Send a value; the blocks in it are given away and closed.

    Raises:
        TypeError, AttributeError, pickle.PicklingError: it cannot be pickled; nothing was sent.
    """
    blocks: list[Block] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if not isinstance(item, Block):
                return None
            blocks.append(item)
            return item.shape

    data = io.BytesIO()
    Pickler(data, protocol=5).dump(value)
    connection.send_bytes(len(blocks).to_bytes(4, "little"))
    for block in blocks:
        reduction.send_handle(connection, block.handle, None)
        block.close()
    connection.send_bytes(data.getbuffer())


def receive(connection: Connection) -> Any:
    """Receive what `send` sent, from a process of our own; arrays come in place of blocks.

    Raises:
        EOFError, OSError: the other process is gone.
    """
    count = int.from_bytes(connection.recv_bytes(), "little")
    handles = iter([reduction.recv_handle(connection) for _ in range(count)])

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, shape: Any) -> Any:
            block = Block(shape, next(handles))
            block.close()
            return block.array

    return Unpickler(io.BytesIO(connection.recv_bytes())).load()
