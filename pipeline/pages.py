"""New memory of the host in whole pages, and what freed results leave."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np

from pipeline.arrays import HostArray, address_of
from pipeline.config import GIB, MIB

HUGE_PAGE_BYTES = 2 * MIB  # on x86-64, and on ARM with pages of 4 KiB


@dataclass(frozen=True, eq=False)
class Pages:
    """Private memory of its own, zeroed, whose pages the system gives when they are written first: huge ones, where it
    has some. `memory` (uint8) begins with a huge page."""

    map: mmap.mmap
    memory: HostArray

    @classmethod
    def new(cls, n_bytes: int) -> Pages:
        """Raises MemoryError: the system refused."""
        try:
            whole = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"can't allocate {n_bytes / GIB:.2f} GiB of memory: {error}") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                whole.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a system built without them
                pass
        array = np.frombuffer(whole, np.uint8)
        first = -address_of(array) % HUGE_PAGE_BYTES
        return cls(whole, array[first : first + n_bytes])


def touch(memory: HostArray) -> None:
    """Have the system make the pages of new memory (uint8)."""
    memory[:: mmap.PAGESIZE] = 0


class RecycledPages:
    """Memory for results, which is used again once nobody holds a result any more: clearing new pages takes the system
    longer than a GPU takes to fill them.

    What is kept is free memory to the system, which takes it whenever it needs some (MADV_FREE). Up to `most_bytes`
    are kept. May be used from any thread.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes if hasattr(mmap, "MADV_FREE") else 0
        self._free: deque[Pages] = deque()  # whose single operations need no lock

    def take(self, n_bytes: int) -> tuple[HostArray, bool]:
        """Memory (uint8), and whether it has been written before. It comes back when its last view has gone."""
        pages = self._found(n_bytes)
        recycled = pages is not None
        pages = pages or Pages.new(n_bytes)
        owner = (ctypes.c_uint8 * pages.memory.nbytes).from_buffer(pages.memory)  # type: ignore[arg-type]
        weakref.finalize(owner, self._give_back, pages).atexit = False
        return np.ctypeslib.as_array(owner)[:n_bytes], recycled

    def _found(self, n_bytes: int) -> Pages | None:
        """Kept pages that are large enough, and not much larger."""
        for pages in list(self._free):
            if n_bytes <= pages.memory.nbytes <= 1.25 * n_bytes:
                try:
                    self._free.remove(pages)
                except ValueError:  # another thread has them
                    continue
                return pages
        return None

    def _give_back(self, pages: Pages) -> None:
        """NOTE: called when an object dies: anywhere, perhaps while this thread is in another method here."""
        if sum(each.memory.nbytes for each in list(self._free)) + pages.memory.nbytes <= self._most_bytes:
            pages.map.madvise(mmap.MADV_FREE)
            self._free.append(pages)

    @property
    def kept_bytes(self) -> int:
        return sum(pages.memory.nbytes for pages in list(self._free))

    def clear(self) -> None:
        """Give what is kept back to the system."""
        self._free.clear()


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


RESULTS = RecycledPages(memory_bytes() // 8)
