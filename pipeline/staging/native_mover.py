"""Staging lanes in C (csrc/host/host_lanes.c): chunks between host rows and a device's slots, by pinned pieces.

The executor gives whole chunks and hears when they are through. What happens to their pieces happens in C: Python took
100 to 150 us for a piece in and one out (H200 host), in which the bus moves 4 MiB and more each way.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, NamedTuple

import numpy as np

from pipeline.arrays import address_of
from pipeline.devices.base import NativeCopies
from pipeline.errors import PipelineError
from pipeline.flow import HostRows, SourceRows, TargetRows
from pipeline.staging.native import NativeWorkers, Request, copy_request
from pipeline.staging.ring import Ring


# The same fields as in csrc/host/host_lanes.c.
class _Device(ctypes.Structure):
    _fields_ = (
        ("context", ctypes.c_void_p),
        ("in_stream", ctypes.c_void_p),
        ("out_stream", ctypes.c_void_p),
        ("set_context", ctypes.c_void_p),
        ("copy_in", ctypes.c_void_p),
        ("copy_out", ctypes.c_void_p),
        ("record", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
    )


class _Ring(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("memory", ctypes.POINTER(ctypes.c_void_p)),
        ("events", ctypes.POINTER(ctypes.c_void_p)),
    )


class _TransferRequest(ctypes.Structure):
    _fields_ = (
        ("host", Request),
        ("device", ctypes.c_uint64),
        ("row_bytes", ctypes.c_int64),
        ("piece_rows", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        ("after", ctypes.c_void_p),
        ("out", ctypes.c_int32),
    )


class _TransferResult(ctypes.Structure):
    _fields_ = (
        ("position", ctypes.c_int64),
        ("error", ctypes.c_int32),
        ("device_error", ctypes.c_int32),
        ("cancelled", ctypes.c_int32),
    )


class Span(NamedTuple):
    """A piece's two copies, in seconds of time.perf_counter, and its rows."""

    host_start_s: float
    host_end_s: float
    device_start_s: float
    device_end_s: float
    rows: int


class Transfer:
    """A chunk on its way through a lane. An interrupt may come between any two of its steps."""

    def __init__(self, lanes: StagingLanes, host_rows: HostRows, rows: int, piece_rows: int, what: str) -> None:
        self._lanes, self._host_rows, self._rows, self._piece_rows, self._what = (
            lanes,
            host_rows,
            rows,
            piece_rows,
            what,
        )
        self.memory = ctypes.create_string_buffer(lanes.transfer_bytes)
        self.spans_ns = np.zeros((-(-rows // piece_rows), 4), np.int64)
        self.is_over = False  # as `done` has seen

    def let_kernel_follow(self, slot: int) -> bool:
        """Of a load: let the slot's next kernel wait for its copies, if all of them are queued. Whether they are."""
        event = self._lanes.library.host_lanes_queued(self.memory)
        if event is not None:
            self._lanes.copies.before_kernel(slot, event)
        return event is not None

    def done(self) -> bool:
        """Whether the chunk is through.

        Raises:
            DeviceError: the device failed. PipelineError: it was cancelled.
            Exception: what a copy on the host raises, such as OSError for a file.
        """
        result = _TransferResult()
        if not self._lanes.library.host_lanes_done(self.memory, ctypes.byref(result)):
            return False
        self._lanes.forget(self)
        self.is_over = True
        if result.device_error:
            raise self._lanes.copies.error(self._what, result.device_error)
        if result.error:
            raise self._host_rows.failure(result.error, result.position, self._rows)
        if result.cancelled:
            raise PipelineError(f"the {self._what} was cancelled")
        return True

    def times(self) -> tuple[float, float]:
        """When the first of its copies began and the last one ended, in seconds of time.perf_counter."""
        return float(self.spans_ns.min()) * 1e-9, float(self.spans_ns.max()) * 1e-9

    def spans(self) -> list[Span]:
        """When each piece was copied; only once the transfer is done."""
        left, spans = self._rows, []
        for host_start_s, host_end_s, start_s, end_s in (self.spans_ns * 1e-9).tolist():
            spans.append(Span(host_start_s, host_end_s, start_s, end_s, min(left, self._piece_rows)))
            left -= self._piece_rows
        return spans


def show_in_profiles(workers: NativeWorkers) -> bool:
    """Whether a profiler sees what lanes do: the library was built with NVTX's headers."""
    return bool(workers.library.host_lanes_have_ranges())


class StagingLanes:
    """Both lanes of one device: a ring of pinned pieces each, allocated at first use, and a thread."""

    def __init__(self, workers: NativeWorkers, copies: NativeCopies, ring_in: Ring, ring_out: Ring) -> None:
        """All pieces of both rings are the lanes' until `close`."""
        self.library, self.copies, self._ring_in, self._ring_out = workers.library, copies, ring_in, ring_out
        self.transfer_bytes = int(self.library.host_lanes_transfer_bytes())
        self._transfers: set[Transfer] = set()  # keeps their memory alive until they are done
        self._in_use: set[Ring] = set()
        device = _Device(copies.context, copies.in_stream, copies.out_stream, *copies.functions)
        self._lanes = self.library.host_lanes_open(workers.pool, ctypes.byref(device), ring_in.poison)
        if not self._lanes:
            code = ctypes.get_errno()
            raise OSError(
                code,
                f"can't start the thread of the staging lanes: {os.strerror(code)}; allow more threads (ulimit -u), or "
                f"set PIPELINE_NATIVE_COPY=0",
            )
        self._close = weakref.finalize(self, _close_lanes, self.library, self._lanes, os.getpid(), workers)

    def load(self, source: SourceRows, rows: int, slot: int, chunk: int) -> Transfer | None:
        """Copy a chunk's rows into the slot's input buffer; None where the copy workers in C can't read them.

        Nothing else may use the buffer until the transfer is done.
        """
        host = _whole_chunk(source, rows, self._ring_in, drains=False)
        if host is None:
            return None
        what = f"H2D copy of slot {slot}"
        return self._submit(source, host, self.copies.input(slot), self._ring_in, chunk, None, what)

    def store(self, target: TargetRows, rows: int, slot: int, chunk: int) -> Transfer | None:
        """Copy rows from the slot's output buffer to where they go, once the slot's last kernel is done; None where the
        workers in C can't write them."""
        host = _whole_chunk(target, rows, self._ring_out, drains=True)
        if host is None:
            return None
        what, after = f"D2H copy of slot {slot}", self.copies.after_kernel(slot)
        return self._submit(target, host, self.copies.output(slot), self._ring_out, chunk, after, what)

    def _submit(
        self, host_rows: HostRows, host: Request, device: int, ring: Ring, chunk: int, after: int | None, what: str
    ) -> Transfer:
        if ring not in self._in_use:
            self._use(ring)
        transfer = Transfer(self, host_rows, host.rows, ring.piece_rows, what)
        spans, out = address_of(transfer.spans_ns), ring is self._ring_out
        request = _TransferRequest(host, device, ring.row_bytes, ring.piece_rows, chunk, spans, after, out)
        self._transfers.add(transfer)
        self.library.host_lanes_submit(self._lanes, transfer.memory, ctypes.byref(request))
        return transfer

    def _use(self, ring: Ring) -> None:
        pieces = ring.take_all()
        memory = (ctypes.c_void_p * len(pieces))(*(address_of(piece) for piece in pieces))
        events = (ctypes.c_void_p * len(pieces))(*(self.copies.new_event() for _ in pieces))
        request = _Ring(len(pieces), pieces[0].nbytes, memory, events)
        code = self.library.host_lanes_use(self._lanes, ring is self._ring_out, ctypes.byref(request))
        if code:
            raise OSError(code, f"can't set up the staging lanes: {os.strerror(code)}")
        self._in_use.add(ring)

    def forget(self, transfer: Transfer) -> None:
        self._transfers.discard(transfer)

    def cancel(self) -> None:
        """Give up all transfers; afterwards nothing is copied to or from a piece any more."""
        self.library.host_lanes_cancel(self._lanes)
        self._transfers.clear()

    def close(self) -> None:
        """End the thread, after which the rings' memory may be freed."""
        self._close()


def _close_lanes(library: Any, lanes: int, pid: int, workers: NativeWorkers) -> None:
    """End the thread, which `workers` must outlive; in a forked process there is none."""
    if os.getpid() == pid:
        library.host_lanes_close(lanes)


def _whole_chunk(rows: HostRows, count: int, ring: Ring, *, drains: bool) -> Request | None:
    """What C is asked for to move a chunk's rows through a ring, whose pieces it chooses."""
    return copy_request(rows, drains, 0, count, ring.features, ring.dtype.itemsize)
