"""New memory of the host whose pages are all there."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.arrays import HostArray, address_of
from pipeline.config import MIB, cores

_HUGE_PAGE_BYTES = 2 * MIB  # on x86-64, and on ARM with pages of 4 KiB
_THREADS = 4  # more of them make the system no faster (docs/notes/staging.md)


def touched_memory(n_bytes: int) -> HostArray:
    """Zeroed memory (uint8) that begins with a page, in huge pages where the system has some.

    Several threads touch the pages, since clearing them takes the system longer than all else that is done with them.

    Raises:
        MemoryError, OSError: there isn't as much.
    """
    whole = mmap.mmap(-1, n_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            whole.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a system built without them
            pass
    array = np.frombuffer(whole, np.uint8)
    first = -address_of(array) % _HUGE_PAGE_BYTES
    memory = array[first : first + n_bytes]
    threads = min(_THREADS, cores(), -(-n_bytes // _HUGE_PAGE_BYTES))
    if threads <= 1:
        memory[:: mmap.PAGESIZE] = 0
        return memory
    pages = -(-n_bytes // _HUGE_PAGE_BYTES)
    bounds = [pages * i // threads * _HUGE_PAGE_BYTES for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda low, high: _touch(memory[low:high]), bounds, bounds[1:]))
    return memory


def _touch(memory: HostArray) -> None:
    memory[:: mmap.PAGESIZE] = 0
