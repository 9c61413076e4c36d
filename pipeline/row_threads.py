"""Threads of the process for the CPU's products: each computes blocks of rows on its own, with torch in one thread.

A matrix product that torch itself spreads over threads waits for the slowest of them, while NumPy's part of a block
runs in one thread and leaves the others idle. The threads stay for the process's life, as torch's own do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from queue import SimpleQueue

from pipeline.config import cores

_lock = threading.Lock()
_pools: dict[int, _Pool] = {}  # by process: threads don't live on in a forked one


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

    pool = _pool()
    futures = [pool.submit(work) for _ in range(threads)]
    try:
        wait(futures)
    except BaseException:  # an interrupt: nobody may write the caller's memory afterwards
        waiting.clear()
        wait(futures)
        raise
    for future in futures:
        future.result()


def _pool() -> _Pool:
    with _lock:
        pool = _pools.get(os.getpid())
        if pool is None:
            pool = _pools[os.getpid()] = _Pool(cores())
        return pool


class _Pool:
    """Threads in which torch computes with one thread.

    Daemons, not a ThreadPoolExecutor: that takes no work once the interpreter has begun to exit, when a stream that was
    left open still computes and waits for it.
    """

    def __init__(self, threads: int) -> None:
        import torch

        self._jobs: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        # NOTE: set_num_threads is for the calling thread, and for threads that use torch for the first time afterwards.
        # The second part is undone here; a thread that hadn't used torch yet would take that value (torch 2.13).
        callers = torch.get_num_threads()
        try:
            for _ in range(threads):
                ready = threading.Event()
                threading.Thread(target=self._loop, args=(ready,), name="host-rows", daemon=True).start()
                ready.wait()
        finally:
            torch.set_num_threads(callers)

    def _loop(self, ready: threading.Event) -> None:
        import torch

        torch.get_num_threads()  # the first use
        torch.set_num_threads(1)
        ready.set()
        while True:
            work, future = self._jobs.get()
            try:
                work()
            except BaseException as error:  # handed to the caller by the future
                future.set_exception(error)
            else:
                future.set_result(None)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._jobs.put((work, future))
        return future
