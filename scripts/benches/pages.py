"""Fresh memory: touching it before anything is measured, and how fast the system clears pages of it.

As a program, `pages.py GIB` touches so much memory in a process of its own and says at what rate.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BLOCK_BYTES = 2**21  # a huge page
PAGE_BYTES = 4096
KEPT_FREE = 0.15  # of the memory that is available


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int:
    """Memory that may be taken without swapping, most of what the system calls available."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(int(fields["MemAvailable"].split()[0]) * 1024 * (1 - KEPT_FREE))


def in_threads(run: Callable[[], None], threads: int) -> float:
    """Seconds until so many threads have run that."""
    running = [threading.Thread(target=run) for _ in range(threads)]
    begin = time.perf_counter()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return time.perf_counter() - begin


def touch_fresh(n_bytes: int, threads: int) -> float:
    """Seconds in which so many threads write one byte to every page of a new NumPy array.

    The array is as NumPy allocates it, asking for huge pages, and goes back to the system afterwards. Threads take
    huge pages one after the other: a page is cleared by the first write to it.
    """
    fresh, blocks = np.empty(n_bytes, np.uint8), itertools.count()

    def touch() -> None:
        while (start := next(blocks) * BLOCK_BYTES) < n_bytes:
            fresh[start : start + BLOCK_BYTES : PAGE_BYTES] = 1

    return in_threads(touch, threads)


def thread_counts() -> list[int]:
    """What clearing is tried with: neither few threads nor all of them are always the fastest."""
    return sorted({min(threads, cores()) for threads in (4, 8, 12, 16)})


def touch_first(gib: float) -> str:
    """Touch memory and give it back, all at once and by all cores. What was done, in words.

    NOTE: a virtual machine may get its memory from the host only when it first touches it, several times slower than
    it clears pages later. Whoever measures in such memory first measures the host.
    """
    n_bytes = min(int(gib * 2**30), free_bytes())
    seconds = touch_fresh(n_bytes, cores())
    return f"touched {n_bytes / 2**30:.1f} GiB of memory at {n_bytes / seconds / 1e9:.1f} GB/s and gave it back"


if __name__ == "__main__":
    print(touch_first(float(sys.argv[1])))
