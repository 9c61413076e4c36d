"""Copy workers made of Python threads."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.rows import Job


class _Running:
    """A copy job on a worker thread."""

    def __init__(self, pool: ThreadPoolExecutor, job: Job) -> None:
        self._future: Future[tuple[float, float]] = pool.submit(_timed, job)

    def done(self) -> bool:
        if not self._future.done():
            return False
        self._future.result()
        return True

    def times(self) -> tuple[float, float]:
        return self._future.result()


def _timed(job: Job) -> tuple[float, float]:
    start = time.perf_counter()
    job()
    return start, time.perf_counter()


class ThreadWorkers:
    """Copy workers made of Python threads: NumPy and the file calls release the GIL while they move bytes."""

    def __init__(self, count: int, reason: str = "") -> None:
        self.count = count
        self.description = f"copy workers: {count} (NumPy{'; ' if reason else ''}{reason})"
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.count, thread_name_prefix="pipeline-copy")

    def submit(self, job: Job) -> _Running:
        return _Running(self._pool, job)

    def wait_all(self) -> None:
        """A pool that is shut down has done its jobs, also those of which an interrupt lost the trace."""
        old, self._pool = self._pool, self._new_pool()
        old.shutdown(wait=True)

    def run(self, job: Job) -> None:
        job()

    def close(self) -> None:
        self._pool.shutdown(wait=True)
