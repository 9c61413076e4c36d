"""Threads of the process for the CPU's products: each computes blocks on its own, with torch in one thread.

A matrix product that torch itself spreads over threads waits for the slowest of them, has bits that depend on their
number, and leaves them idle in NumPy's part of a block. The threads stay for the process's life, as torch's own do.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar, cast

from pipeline.config import cores
from pipeline.errors import uninterrupted

_Task = TypeVar("_Task")

_lock = threading.Lock()
_pools: dict[int, _Pool] = {}  # by process: threads don't live on in a forked one


def each(
    compute: Callable[[_Task], None], tasks: Iterable[_Task], threads: int, *, one_torch_thread: bool = False
) -> None:
    """compute(task) for each of `tasks`, in up to `threads` threads and any order. Blocks until all is done.

    A single one, or a single thread, stays in the calling thread, if MKL can be set to one thread meanwhile; but not
    where all of torch, not MKL alone, must have `one_torch_thread`. Raises the first exception of `compute`; tasks that
    had begun are finished before.
    """
    waiting = list(tasks)
    threads = min(threads, len(waiting), cores())
    set_mkl_threads = _mkl_threads()
    if threads <= 1 and set_mkl_threads is not None and not one_torch_thread:
        before = set_mkl_threads(1)
        try:
            for task in waiting:
                compute(task)
        finally:
            set_mkl_threads(before)
        return
    waiting.reverse()
    computing = 0
    changed = threading.Condition()

    def work() -> bool:
        nonlocal computing
        with changed:
            if not waiting:
                return False
            task = waiting.pop()
            computing += 1
        try:
            compute(task)
        except BaseException:
            waiting.clear()
            raise
        finally:
            with changed:
                computing -= 1
                changed.notify_all()
        return bool(waiting)

    def end() -> None:
        with changed:
            waiting.clear()
            changed.wait_for(lambda: not computing)

    try:
        pool = _pool()
        futures = [pool.submit(work) for _ in range(threads)]
        wait(futures)
    except BaseException:  # an interrupt: nobody may write the caller's memory afterwards
        uninterrupted(end)
        raise
    for future in futures:
        future.result()


def torch_threads() -> int:
    """How many threads torch uses in the calling one.

    NOTE: a thread that asks torch for the first time while the pool is made would be told 1, then and ever after (see
    `_Pool`). So it waits for that here.
    """
    import torch

    with _lock:
        return torch.get_num_threads()


@cache
def _mkl_threads() -> Callable[[int], int] | None:
    """Sets the number of MKL's threads for the calling thread and returns the one before; None without MKL in torch.

    NOTE: torch.set_num_threads won't do: a thread that uses torch for the first time meanwhile keeps that number.
    """
    import torch

    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return cast("Callable[[int], int]", library.MKL_Set_Num_Threads_Local)
    except (OSError, AttributeError):
        return None


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

        self._waiting: SimpleQueue[tuple[Callable[[], bool], Future[None]]] = SimpleQueue()
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
            work, future = self._waiting.get()
            try:
                more = work()
            except BaseException as error:  # handed to the caller by the future
                future.set_exception(error)
            else:
                if more:
                    self._waiting.put((work, future))  # behind other callers' work, so that nobody waits long
                else:
                    future.set_result(None)

    def submit(self, work: Callable[[], bool]) -> Future[None]:
        """Call `work` until it returns False."""
        future: Future[None] = Future()
        self._waiting.put((work, future))
        return future
