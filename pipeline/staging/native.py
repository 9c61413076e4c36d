"""Copy workers in C (csrc/host/host_copy.c), off the GIL: one job keeps all busy, the executor polls its counter."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import time
import weakref
from pathlib import Path
from typing import Any

from pipeline.arrays import address_of
from pipeline.config import native_copy
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Cast
from pipeline.errors import PipelineError
from pipeline.flow import Drain, HostRows, Job, Operation, Workers
from pipeline.staging.threads import ThreadWorkers

_COPY, _READ_FILE, _WRITE_FILE = range(3)
_CASTS: dict[Cast | None, int] = {
    None: 0,
    Cast(FLOAT32, BFLOAT16): 1,
    Cast(FLOAT32, FLOAT16): 2,
    Cast(BFLOAT16, FLOAT32): 3,
    Cast(FLOAT16, FLOAT32): 4,
}
INSTRUCTIONS = {"best": 0, "AVX2": 1, "portable": 2}  # at most these


class Request(ctypes.Structure):
    """The same fields as in csrc/host/host_copy.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("cast", ctypes.c_int32),
        ("streaming", ctypes.c_int32),
        ("fresh", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("target", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
        ("source_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("offset", ctypes.c_int64),
    )


class _Result(ctypes.Structure):
    """The same fields as in csrc/host/host_copy.h."""

    _fields_ = (
        ("start_ns", ctypes.c_int64),
        ("end_ns", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("error", ctypes.c_int32),
    )


@functools.cache
def _library() -> tuple[Any, str]:
    """The library, or None and the reason why it can't be used."""
    package = Path(__file__).resolve().parent.parent
    built = sorted(package.glob("_host_copy*.so"))
    if not built:
        return None, "not built: no C compiler when the package was installed"
    folders = (package / "csrc" / "host", package.parent / "csrc" / "host")
    files = sorted(next((folder for folder in folders if folder.is_dir()), package).glob("*.[ch]"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    reason = ""
    for path in built:
        try:
            library = ctypes.CDLL(str(path), use_errno=True)
            library.host_copy_source.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            reason = f"can't be loaded: {error}"
            continue
        if library.host_copy_source() == digest.encode():
            pointer = ctypes.c_void_p
            for name, result, *arguments in (
                ("host_copy_open", pointer, ctypes.c_int, ctypes.c_int),
                ("host_copy_close", None, pointer),
                ("host_copy_isa", ctypes.c_char_p, pointer),
                ("host_copy_job_bytes", ctypes.c_size_t),
                ("host_copy_submit", ctypes.c_int, pointer, pointer, pointer),
                ("host_copy_done", ctypes.c_int, pointer, pointer),
                ("host_copy_wait", None, pointer, pointer),
                ("host_copy_pending", ctypes.c_int, pointer),
                ("host_lanes_open", pointer, pointer, pointer, ctypes.c_int),
                ("host_lanes_use", ctypes.c_int, pointer, ctypes.c_int, pointer),
                ("host_lanes_transfer_bytes", ctypes.c_size_t),
                ("host_lanes_submit", None, pointer, pointer, pointer),
                ("host_lanes_queued", pointer, pointer),
                ("host_lanes_done", ctypes.c_int, pointer, pointer),
                ("host_lanes_cancel", None, pointer),
                ("host_lanes_close", None, pointer),
                ("host_lanes_have_ranges", ctypes.c_int),
            ):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library, ""
        reason = "built from other sources: install the package again"
    return None, reason


class _NativeJob:
    """A job in the native pool. An interrupt may come between any two of its steps: each can be done again."""

    def __init__(self, workers: NativeWorkers, job: Job) -> None:
        self._workers, self._job = workers, job
        self.memory = ctypes.create_string_buffer(workers.job_bytes)
        self._times: tuple[float, float] | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        if self._times is None:
            result = _Result()
            if not self._workers.library.host_copy_done(self.memory, ctypes.byref(result)):
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
        self._workers.library.host_copy_wait(self._workers.pool, self.memory)
        self.done()

    def times(self) -> tuple[float, float]:
        if self._times is None:
            raise PipelineError("the copy isn't done yet")
        return self._times


class NativeWorkers:
    """Copy workers in C. What they can't do (columns apart, foreign byte order, files with gaps between rows) NumPy
    does, in as many Python threads."""

    def __init__(self, count: int, instructions: str = "best") -> None:
        self.library, reason = _library()
        if self.library is None:
            raise PipelineError(f"the native copy workers {reason}")
        self.count = count
        self.pool = self.library.host_copy_open(count, INSTRUCTIONS[instructions])
        if not self.pool:
            code = ctypes.get_errno()
            raise OSError(code, f"can't start {count} copy workers: {os.strerror(code)}")
        self._close = weakref.finalize(self, _close_pool, self.library, self.pool, os.getpid())
        self.job_bytes = int(self.library.host_copy_job_bytes())
        self._isa = self.library.host_copy_isa(self.pool).decode()
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

    def _submit(self, job: Job, request: Request) -> _NativeJob:
        queued = _NativeJob(self, job)
        self._jobs.add(queued)
        code = self.library.host_copy_submit(self.pool, queued.memory, ctypes.byref(request))
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
        while self.library.host_copy_pending(self.pool):
            time.sleep(1e-4)
        self._threads.wait_all()
        for job in list(self._jobs):  # also of a run that was given up, and asks for none of them
            if self.library.host_copy_done(job.memory, ctypes.byref(_Result())):
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
        library.host_copy_close(pool)


def copy_request(
    rows: HostRows, drains: bool, first: int, count: int, features: int, dtype_bytes: int
) -> Request | None:
    """What C is asked for to move `count` rows, from `first` on, but for the piece: its address and row stride.

    `dtype_bytes` is the size of an element of the wire's. None where C can't move these rows.
    """
    plain = rows.plain
    if plain is None or plain.cast not in _CASTS:
        return None
    cast = _CASTS[plain.cast]
    length = features * (1 if cast else dtype_bytes)
    place = plain.address + first * plain.stride_bytes
    request = Request(cast=cast, streaming=drains, fresh=plain.fresh, rows=count, length=length)
    if plain.fd is not None:
        request.kind = _WRITE_FILE if drains else _READ_FILE
        request.fd, request.offset = plain.fd, place
    elif drains:
        request.kind, request.target = _COPY, place
    else:
        request.kind, request.source = _COPY, place
    if drains:
        request.target_stride = plain.stride_bytes
    else:
        request.source_stride = plain.stride_bytes
    return request


def _job_request(job: Job) -> Request | None:
    """What the native pool is asked for, or None where it can't do the job."""
    drains, piece = isinstance(job, Drain), job.piece
    request = copy_request(job.rows, drains, job.first, len(piece), piece.shape[1], piece.itemsize)
    if request is None:
        return None
    if drains:
        request.source, request.source_stride = address_of(piece), piece.strides[0]
    else:
        request.target, request.target_stride = address_of(piece), piece.strides[0]
    return request


def workers_kind() -> str:
    """What `open_workers` gives: "native" or "NumPy"."""
    return "native" if native_copy() and _library()[0] is not None else "NumPy"


def open_workers(count: int) -> Workers:
    """Copy workers: native ones, or Python threads where the library can't be used or PIPELINE_NATIVE_COPY is 0."""
    if not native_copy():
        return ThreadWorkers(count, "native ones switched off")
    library, reason = _library()
    return NativeWorkers(count) if library is not None else ThreadWorkers(count, f"the native ones {reason}")
