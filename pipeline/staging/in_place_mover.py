"""Whole chunks from and to memory of the caller's that a device's copy engines can use as it is: no ring, one copy."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.arrays import HostArray
from pipeline.devices.base import Device
from pipeline.errors import DeviceError
from pipeline.instrument import Ranges, Recorder
from pipeline.rows import HostRows, Operation, SourceRows, TargetRows
from pipeline.staging.mover import Mover, Transfer


class _OneCopy(Transfer):
    def __init__(self, stage: str, chunk: int, n_bytes: int) -> None:
        self._stage, self._chunk, self._n_bytes = stage, chunk, n_bytes
        self._operation: Operation | None = None
        self._error: Exception | None = None

    def begin(self, ranges: Ranges, copy: Callable[[], Operation]) -> None:
        try:
            with ranges(self._stage, self._chunk):
                self._operation = copy()
        except Exception as error:  # raised by done()
            self._error = error

    def queued(self) -> bool:
        return self._error is None

    def done(self) -> bool:
        self.failed_stage = self._stage
        if self._error is not None:
            raise self._error
        return self._operation is not None and self._operation.done()

    def _times(self) -> tuple[float, float]:
        assert self._operation is not None
        return self._operation.times()

    def record(self, recorder: Recorder) -> None:
        recorder.add(self._stage, self._chunk, *self._times(), self._n_bytes)

    @property
    def end_s(self) -> float:
        return self._times()[1]


class InPlaceMover(Mover):
    """Queues one copy a chunk."""

    def __init__(self, device: Device, in_row_bytes: int, out_row_bytes: int) -> None:
        self._device, self._in_row_bytes, self._out_row_bytes = device, in_row_bytes, out_row_bytes
        self._ranges = Ranges()

    def begin_run(self, ranges: Ranges) -> None:
        self._ranges = ranges

    def loads(self, rows: HostRows) -> bool:
        return rows.array is not None and self._device.in_place(rows.array)

    stores = loads

    def load(self, rows: SourceRows, count: int, slot: int, chunk: int) -> Transfer:
        memory = _memory(rows)
        transfer = _OneCopy("H2D", chunk, count * self._in_row_bytes)
        transfer.begin(self._ranges, lambda: self._device.upload(slot, 0, memory))
        return transfer

    def store(self, rows: TargetRows, count: int, slot: int, chunk: int) -> Transfer:
        memory = _memory(rows)
        transfer = _OneCopy("D2H", chunk, count * self._out_row_bytes)
        transfer.begin(self._ranges, lambda: self._device.download(slot, 0, memory))
        return transfer

    def cancel(self) -> None:
        synchronize(self._device)


def _memory(rows: HostRows) -> HostArray:
    assert rows.array is not None  # loads() and stores() said so
    return rows.array


def synchronize(device: Device) -> None:
    """Wait until nothing that was queued on the device runs any more. A lost device runs nothing."""
    try:
        device.synchronize()
    except DeviceError:
        pass  # whatever brought the caller here is the error to report
