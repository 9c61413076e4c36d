"""One device of a fleet: prepared for a layer, with what moves rows to it and from it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import GIB, Staging
from pipeline.devices.base import Device
from pipeline.dtypes import DType
from pipeline.errors import DeviceMemoryError
from pipeline.executor import Executor
from pipeline.flow import Chunk, Feed, Sink
from pipeline.instrument import Recorder
from pipeline.layer.base import Layer
from pipeline.rows import Workers
from pipeline.staging.movers import Movers, Wire
from pipeline.upload import StagedUpload


@dataclass(frozen=True)
class Assignment:
    """What all devices of a fleet are prepared for: a layer and results as they cross the bus, and the slots."""

    layer: Layer
    out_dtype: DType
    chunk_rows: int
    num_streams: int


class Station:
    """One opened device, prepared for a layer, with what moves rows to it and from it.

    Nothing else of a fleet or a run knows the executor and the movers.
    """

    def __init__(self, device: Device, workers: Workers, assignment: Assignment, staging: Staging) -> None:
        layer, out_dtype, num_streams = assignment.layer, assignment.out_dtype, assignment.num_streams
        self._upload = device.uploader = StagedUpload(device, workers, staging)
        device.prepare(layer, out_dtype, assignment.chunk_rows)
        _check_memory(device, assignment)
        device.allocate(assignment.chunk_rows, num_streams)
        self.device, self.workers, self._num_streams = device, workers, num_streams
        wire = Wire(layer.in_features, layer.out_features, layer.dtype, out_dtype)
        self.movers = Movers(device, workers, wire, staging, self._upload.take)

    def restage(self, workers: Workers, staging: Staging) -> None:
        """Stage the next runs' rows with other workers and rings. Between runs only."""
        self.workers = self._upload.workers = workers
        self.movers.restage(workers, staging)

    @property
    def pinned_bytes(self) -> int:
        """What its rings take, which are allocated when they are first used, and what the weights came through."""
        return self.movers.pinned_bytes + self._upload.pinned_bytes

    def run(
        self,
        feed: Feed,
        sink: Sink,
        recorder: Recorder,
        on_commit: Callable[[Chunk], None],
        stopping: threading.Event,
    ) -> None:
        """Move the feed's chunks through the device until there are no more. Blocks; raises as `Executor.run`."""
        Executor(self.device, self.movers, self._num_streams, feed, sink, recorder, on_commit, stopping).run()

    def close(self) -> None:
        """End what moves rows. The device stays open, its copy workers too."""
        self.movers.close()


def _check_memory(device: Device, assignment: Assignment) -> None:
    """Check that the slots fit into the device's free memory.

    Raises:
        DeviceMemoryError: they don't fit beside the weights.
    """
    layer, chunk_rows, num_streams = assignment.layer, assignment.chunk_rows, assignment.num_streams
    row_bytes = layer.in_features * layer.dtype.itemsize + layer.out_features * assignment.out_dtype.itemsize
    needed, free = num_streams * chunk_rows * row_bytes, device.free_bytes()
    if free is not None and needed > free:
        fitting_rows = free // (num_streams * row_bytes)
        smaller = f"chunk_rows={fitting_rows} or less, or " if fitting_rows else ""
        raise DeviceMemoryError(
            f"{num_streams} chunks of {chunk_rows} rows need {needed / GIB:.2f} GiB on {device.name}, "
            f"{free / GIB:.2f} GiB are free: pass {smaller}fewer num_streams"
        )
