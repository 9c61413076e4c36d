"""Copy workers in C (csrc/host/copy_workers.c), off the GIL: one job keeps all of them busy, and is polled."""

from __future__ import annotations

import ctypes
import functools
import os
import time
import weakref
from typing import Any

from pipeline.arrays import address_of
from pipeline.config import native_copy
from pipeline.errors import PipelineError
from pipeline.rows import Drain, Job, Operation, PlainRows, Workers
from pipeline.staging import host_library
from pipeline.staging.host_library import CASTS, COPY, INSTRUCTIONS, READ_FILE, WRITE_FILE, CopyRequest, CopyResult
from pipeline.staging.threads import ThreadWorkers


class _NativeJob:
    """A job in the native pool. An interrupt may come between any two of its steps: each can be done again."""

    def __init__(self, workers: NativeWorkers, job: Job) -> None:
        self._workers, self._job = workers, job
        self.memory = ctypes.create_string_buffer(workers.job_bytes)
        self._times: tuple[float, float] | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        if self._times is None:
            result = CopyResult()
            if not self._workers.library.copy_workers_done(self.memory, ctypes.byref(result)):
                return False
            if result.error:
                self._error = self._job.failure(result.error, result.position)
            self._times = (result.start_ns * 1e-9, result.end_ns * 1e-9)  # the clock of time.perf_counter
            del self._job  # the caller's arrays aren't kept
            self._workers.forget(self)
        if self._error is not None:
            raise self._error
        return True

    def wait(self) -> None:
        """Block until the job is done; raises what it raised."""
        self._workers.library.copy_workers_wait(self._workers.pool, self.memory)
        self.done()

    def times(self) -> tuple[float, float]:
        if self._times is None:
            raise PipelineError("the copy isn't done yet")
        return self._times


class NativeWorkers:
    """Copy workers in C. Rows that aren't plain (columns apart, foreign byte order, files with gaps between rows) are
    copied by NumPy, in as many Python threads."""

    def __init__(self, count: int, instructions: str = "best") -> None:
        self.library, reason = host_library.find_library()
        if self.library is None:
            raise PipelineError(f"the native copy workers {reason}")
        self.count = count
        self.pool = self.library.copy_workers_open(count, INSTRUCTIONS[instructions])
        if not self.pool:
            code = ctypes.get_errno()
            raise OSError(code, f"can't start {count} copy workers: {os.strerror(code)}")
        self._close = weakref.finalize(self, _close_pool, self.library, self.pool, os.getpid())
        self.job_bytes = int(self.library.copy_workers_job_bytes())
        self._isa = self.library.copy_workers_isa(self.pool).decode()
        self._jobs: set[_NativeJob] = set()  # keeps their memory alive until they are done
        self._threads = ThreadWorkers(count)
        self._by_numpy = 0

    @property
    def description(self) -> str:
        numpy = f", {self._by_numpy} copies by NumPy" if self._by_numpy else ""
        return f"copy workers: {self.count} (native, {self._isa}{numpy})"

    def submit(self, job: Job) -> Operation:
        self._check_open()
        request = _job_request(job)
        if request is None:
            self._by_numpy += 1
            return self._threads.submit(job)
        return self._submit(job, request)

    def _submit(self, job: Job, request: CopyRequest) -> _NativeJob:
        queued = _NativeJob(self, job)
        self._jobs.add(queued)
        code = self.library.copy_workers_submit(self.pool, queued.memory, ctypes.byref(request))
        if code:
            self._jobs.discard(queued)
            raise PipelineError(f"a copy job was refused: {os.strerror(code)}")
        return queued

    def run(self, job: Job) -> None:
        self._check_open()
        request = _job_request(job)
        if request is None:
            job()
        else:
            self._submit(job, request).wait()

    def wait_all(self) -> None:
        while self.library.copy_workers_pending(self.pool):
            time.sleep(1e-4)
        self._threads.wait_all()
        for job in list(self._jobs):  # also of a run that was given up, and asks for none of them
            if self.library.copy_workers_done(job.memory, ctypes.byref(CopyResult())):
                self.forget(job)

    def _check_open(self) -> None:
        if not self._close.alive:
            raise PipelineError("these copy workers are closed")

    def forget(self, job: _NativeJob) -> None:
        self._jobs.discard(job)

    def close(self) -> None:
        self._threads.close()
        self._close()


def _close_pool(library: Any, pool: int, pid: int) -> None:
    """End the threads of a pool; in a forked process there are none to wait for."""
    if os.getpid() == pid:
        library.copy_workers_close(pool)


def can_move(plain: PlainRows | None) -> bool:
    """Whether C can read or write these rows."""
    return plain is not None and plain.cast in CASTS


def copy_request(
    plain: PlainRows, first: int, count: int, features: int, dtype_bytes: int, *, drains: bool
) -> CopyRequest:
    """What C is asked for to move `count` rows, from `first` on, but for the piece: its address and row stride.

    `dtype_bytes` is the size of an element on the wire.
    """
    cast = CASTS[plain.cast]
    length = features * (1 if cast else dtype_bytes)
    place = plain.address + first * plain.stride_bytes
    request = CopyRequest(cast=cast, streaming=drains, fresh=plain.fresh, rows=count, length=length)
    if plain.fd is not None:
        request.kind = WRITE_FILE if drains else READ_FILE
        request.fd, request.offset = plain.fd, place
        request.map = plain.map_address if drains and _can_use_maps() else None
    elif drains:
        request.kind, request.target = COPY, place
    else:
        request.kind, request.source = COPY, place
    if drains:
        request.target_stride = plain.stride_bytes
    else:
        request.source_stride = plain.stride_bytes
    return request


@functools.cache
def _can_use_maps() -> bool:
    """Whether the system lets C store through maps of files; it may forbid the call. `pwrite` remains."""
    library, _ = host_library.find_library()
    return library is not None and bool(library.copy_workers_use_maps())


def _job_request(job: Job) -> CopyRequest | None:
    """What the native pool is asked for, or None where it can't do the job."""
    plain, piece, drains = job.rows.plain, job.piece, isinstance(job, Drain)
    if plain is None or not can_move(plain):
        return None
    request = copy_request(plain, job.first, len(piece), piece.shape[1], piece.itemsize, drains=drains)
    if drains:
        request.source, request.source_stride = address_of(piece), piece.strides[0]
    else:
        request.target, request.target_stride = address_of(piece), piece.strides[0]
    return request


def workers_kind() -> str:
    """What `open_workers` gives: "native" or "NumPy"."""
    return "native" if native_copy() and host_library.find_library()[0] is not None else "NumPy"


def open_workers(count: int) -> Workers:
    """Copy workers: native ones, or Python threads where the library can't be used or PIPELINE_NATIVE_COPY is 0."""
    if not native_copy():
        return ThreadWorkers(count, "native ones switched off")
    library, reason = host_library.find_library()
    return NativeWorkers(count) if library is not None else ThreadWorkers(count, f"the native ones {reason}")
