"""Threads of the process for the CPU's products: each computes blocks of rows on its own, with torch in one thread.

A matrix product that torch itself spreads over threads waits for the slowest of them, while NumPy's part of a block
runs in one thread and leaves the others idle. The threads stay for the process's life, as torch's own do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

from pipeline.config import cores

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}  # by process: threads don't live on in a forked one


def each(compute: Callable[[int], None], starts: Iterable[int], threads: int) -> None:
    """compute(start) for each of `starts`, in up to `threads` threads and any order. Blocks until all is done.

    A single one, or a single thread, stays in the calling thread. Raises the first exception of `compute`; blocks that
    had begun are finished before.
    """
    waiting = list(starts)
    threads = min(threads, len(waiting), cores())
    if threads <= 1:
        for start in waiting:
            compute(start)
        return
    waiting.reverse()

    def work() -> None:
        try:
            while True:
                try:
                    start = waiting.pop()
                except IndexError:
                    return
                compute(start)
        except BaseException:
            waiting.clear()
            raise

    futures = [_pool().submit(work) for _ in range(threads)]
    try:
        wait(futures)
    except BaseException:  # an interrupt: nobody may write the caller's memory afterwards
        waiting.clear()
        wait(futures)
        raise
    for future in futures:
        future.result()


def _pool() -> ThreadPoolExecutor:
    with _lock:
        pool = _pools.get(os.getpid())
        if pool is None:
            pool = _pools[os.getpid()] = _new_pool(cores())
        return pool


def _new_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch computes with one thread."""
    import torch

    # NOTE: set_num_threads is for the calling thread, and for threads that use torch for the first time afterwards. The
    # second part is undone here; a thread that hadn't used torch yet would take that value (seen with torch 2.13).
    callers = torch.get_num_threads()
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # the first use
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="host-rows")
    for _ in range(threads):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(callers)
    return pool
