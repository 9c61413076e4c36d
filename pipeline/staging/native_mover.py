"""Moves chunks by code in C (csrc/host/mover.c): plain rows, on a device whose driver C can call.

Python gives whole chunks and hears when they are through; what happens to their pieces happens in C, on a thread of its
own. Python takes longer for a piece than the bus (docs/notes/staging.md).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

import numpy as np

from pipeline.arrays import address_of
from pipeline.devices.base import Device, NativeCopies
from pipeline.errors import PipelineError
from pipeline.instrument import Ranges, Recorder
from pipeline.rows import HostRows, SourceRows, TargetRows, Workers
from pipeline.staging.host_library import MoverDevice, MoverRing, TransferRequest, TransferResult
from pipeline.staging.mover import Mover, Transfer
from pipeline.staging.native import NativeWorkers, can_move, copy_request
from pipeline.staging.ring import Ring, Rings


class NativeTransfer(Transfer):
    """A chunk that C moves. `memory` and `spans_ns` are what C writes to until it is done."""

    def __init__(self, mover: NativeMover, rows: HostRows, ring: Ring, count: int, slot: int, chunk: int) -> None:
        self._mover, self._rows, self._ring, self._count = mover, rows, ring, count
        self._slot, self._chunk = slot, chunk
        self._host_stage, self._device_stage = mover.stages(ring)
        self.memory = ctypes.create_string_buffer(mover.transfer_bytes)
        self.spans_ns = np.zeros((-(-count // ring.piece_rows), 4), np.int64)

    def queued(self) -> bool:
        event = self._mover.library.mover_queued(self.memory)
        if event is not None:
            self._mover.copies.before_kernel(self._slot, event)
        return event is not None

    def done(self) -> bool:
        result = TransferResult()
        if not self._mover.library.mover_done(self.memory, ctypes.byref(result)):
            return False
        self._mover.forget(self)
        what = f"{self._device_stage} copy of slot {self._slot}"
        if result.device_error:
            self.failed_stage = self._device_stage
            raise self._mover.copies.error(what, result.device_error)
        self.failed_stage = self._host_stage
        if result.error:
            raise self._rows.failure(result.error, result.position, self._count)
        if result.cancelled:
            raise PipelineError(f"the {what} was cancelled")
        return True

    def record(self, recorder: Recorder) -> None:
        ring, left = self._ring, self._count
        for host_start_s, host_end_s, start_s, end_s in (self.spans_ns * 1e-9).tolist():
            n_bytes = min(left, ring.piece_rows) * ring.row_bytes
            recorder.add(self._host_stage, self._chunk, host_start_s, host_end_s, n_bytes)
            recorder.add(self._device_stage, self._chunk, start_s, end_s, n_bytes)
            left -= ring.piece_rows

    @property
    def end_s(self) -> float:
        return float(self.spans_ns.max()) * 1e-9


class NativeMover(Mover):
    """Both directions of one device: a ring of pinned pieces each, and a thread in C, started with the first chunk."""

    def __init__(self, workers: NativeWorkers, copies: NativeCopies, rings: Rings) -> None:
        """All pieces of both rings are the mover's until `close`."""
        self.library, self.copies, self._workers, self._rings = workers.library, copies, workers, rings
        self.transfer_bytes = int(self.library.mover_transfer_bytes())
        self._transfers: set[NativeTransfer] = set()  # keeps their memory alive while C writes to it
        self._in_use: set[Ring] = set()
        self._mover: Any = None

    def stages(self, ring: Ring) -> tuple[str, str]:
        """What the copies of a ring's pieces are called, on the host and on the device."""
        return ("fill", "H2D") if ring is self._rings.load else ("drain", "D2H")

    def loads(self, rows: HostRows) -> bool:
        return can_move(rows.plain)

    stores = loads

    def load(self, rows: SourceRows, count: int, slot: int, chunk: int) -> Transfer:
        return self._begin(rows, self._rings.load, count, slot, chunk)

    def store(self, rows: TargetRows, count: int, slot: int, chunk: int) -> Transfer:
        return self._begin(rows, self._rings.store, count, slot, chunk)

    def _begin(self, rows: HostRows, ring: Ring, count: int, slot: int, chunk: int) -> Transfer:
        out, plain = ring is self._rings.store, rows.plain
        assert plain is not None  # loads() and stores() said so
        if ring not in self._in_use:
            self._use(ring)
        transfer = NativeTransfer(self, rows, ring, count, slot, chunk)
        request = TransferRequest(
            host=copy_request(plain, 0, count, ring.features, ring.dtype.itemsize, drains=out),
            device=self.copies.output(slot) if out else self.copies.input(slot),
            row_bytes=ring.row_bytes,
            piece_rows=ring.piece_rows,
            chunk=chunk,
            spans=address_of(transfer.spans_ns),
            after=self.copies.after_kernel(slot) if out else None,
            out=out,
        )
        self._transfers.add(transfer)
        self.library.mover_submit(self._mover, transfer.memory, ctypes.byref(request))
        return transfer

    def _open(self) -> None:
        copies = self.copies
        device = MoverDevice(copies.context, copies.in_stream, copies.out_stream, *copies.functions)
        self._mover = self.library.mover_open(self._workers.pool, ctypes.byref(device), self._rings.load.poison)
        if not self._mover:
            code = ctypes.get_errno()
            raise OSError(
                code,
                f"can't start the mover's thread: {os.strerror(code)}; allow more threads (ulimit -u), or set "
                f"PIPELINE_NATIVE_COPY=0",
            )
        self._close = weakref.finalize(self, _close_mover, self.library, self._mover, os.getpid(), self._workers)

    def _use(self, ring: Ring) -> None:
        """Hand a ring over to C, with an event for each piece."""
        if self._mover is None:
            self._open()
        pieces = ring.take_all()
        memory = (ctypes.c_void_p * len(pieces))(*(address_of(piece) for piece in pieces))
        events = (ctypes.c_void_p * len(pieces))(*(self.copies.new_event() for _ in pieces))
        request = MoverRing(len(pieces), pieces[0].nbytes, memory, events)
        code = self.library.mover_use(self._mover, ring is self._rings.store, ctypes.byref(request))
        if code:
            raise OSError(code, f"can't set up the mover's ring: {os.strerror(code)}")
        self._in_use.add(ring)

    def forget(self, transfer: NativeTransfer) -> None:
        self._transfers.discard(transfer)

    def cancel(self) -> None:
        if self._mover is not None:
            self.library.mover_cancel(self._mover)
        self._transfers.clear()

    def close(self) -> None:
        if self._mover is not None:
            self._close()


def _close_mover(library: Any, mover: int, pid: int, workers: NativeWorkers) -> None:
    """End the thread, which `workers` must outlive; in a forked process there is none."""
    if os.getpid() == pid:
        library.mover_close(mover)


def open_native_mover(device: Device, workers: Workers, rings: Rings, ranges: Ranges) -> NativeMover | None:
    """A mover in C, or None where device or copy workers don't allow it, or a profiler wouldn't see what it does."""
    if not isinstance(workers, NativeWorkers):
        return None
    copies = device.native_copies()
    if copies is None or (not shows_in_profiles(workers) and ranges.active):
        return None
    return NativeMover(workers, copies, rings)


def shows_in_profiles(workers: NativeWorkers) -> bool:
    """Whether a profiler sees what C does: the library was built with NVTX's headers."""
    return bool(workers.library.mover_has_ranges())
