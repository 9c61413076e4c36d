"""What stays warm between runs: opened devices with a layer's weights, copy workers, pinned rings, measurements."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np

from pipeline.arrays import HostArray
from pipeline.config import Staging
from pipeline.devices.base import Device
from pipeline.devices.names import find_devices, open_device
from pipeline.dtypes import FLOAT64, Cast, DType
from pipeline.errors import DeviceMemoryError, DTypeError, OptionError, uninterrupted
from pipeline.flow import Sink, Source
from pipeline.instrument import STAGES, Ceilings, Recorder
from pipeline.io.memory import ArrayRows
from pipeline.layer.base import Layer
from pipeline.options import RunOptions, parsed
from pipeline.rows import Fill, Workers
from pipeline.staging.native import open_workers
from pipeline.station import Assignment, Station
from pipeline.tuning.tune import Tuning

_GATHER_BYTES, _FEWEST_BUFFERS = 96 * 2**20, 2  # pinned chunk buffers for iterables, all devices together


class Fleet:
    """The devices that one layer's rows run through, opened by `open` and warm until `close`.

    Consecutive runs share a fleet; two at once may not use it.

    Attributes:
        stations: the devices, in the order of their names; none before `open` and after `close`.
        chunk_rows: rows of a run's largest chunks, which the devices' slots have room for.
        staging: how rows are staged now; a measurement may change it before a run.
        ceilings: of the devices whose buses were measured, by name, for the bytes of a row. Reports compare with those
            for the bytes that a run moved (`ceilings_of`); with what a caller put here where nothing was measured.
        gather_buffers: the pinned chunk buffers in which iterables' rows were gathered so far.
    """

    device_names: list[str]
    chunk_rows: int
    staging: Staging

    def __init__(self, layer: Layer, options: RunOptions, free_memory: Callable[[], bool] = lambda: False) -> None:
        """Check what can be checked before any device is opened. The layer is the caller's to keep alive.

        `free_memory` is called where a device lacks memory, and says whether it freed some.

        Raises:
            OptionError, DTypeError: the options don't go with the layer.
        """
        _check_layer(layer)
        self._layer, self.options, self._free_memory = weakref.ref(layer), options, free_memory
        self.out_dtype = options.result_dtype(layer.dtype)
        self.wire_in, self.wire_out = options.wire_dtypes(layer.dtype, layer.precision)
        self.wire_row_bytes = layer.in_features * self.wire_in.itemsize, layer.out_features * self.wire_out.itemsize
        parsed("devices", options.devices)
        self.stations: list[Station] = []
        self.ceilings: dict[str, Ceilings] = {}
        self.gather_buffers: list[HostArray] = []
        self._workers: Workers | None = None  # shared by all devices without workers of their own
        self._devices: list[Device] = []
        self._opening: Future[None] | None = None
        self._opened_as: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None
        self._pid = os.getpid()

    @property
    def layer(self) -> Layer:
        layer = self._layer()
        assert layer is not None, "whoever runs a fleet holds its layer"
        return layer

    def start_opening(self) -> None:
        """Begin to open the devices in a thread of its own, where that hasn't begun. `open` waits for it."""
        if self._opening is None:
            opening: Future[None] = Future()
            self._opening = opening
            layer = self.layer  # stays alive until it is on the devices
            thread = threading.Thread(target=self._open_now, args=(opening, layer), name="pipeline-opening")
            try:
                thread.start()
            except BaseException:
                self._opening = None
                raise

    def open(self) -> None:
        """Open the devices, compile or find their kernels, upload the weights. Blocks; does nothing the second time.

        Raises:
            OptionError, DTypeError: the options don't go with the devices.
            DeviceNotFoundError, DeviceMemoryError, CompileError, DriverError
        """
        if self._opening is None:
            self._opening = Future()
            self._open_now(self._opening, self.layer)
        self._opening.result()

    def _open_now(self, opening: Future[None], layer: Layer) -> None:
        try:
            before = layer.state()
            try:
                self._open(layer)
            except DeviceMemoryError:
                self._close_devices()
                if not self._free_memory():
                    raise
                self._open(layer)
        except BaseException as error:
            self._close_devices()
            opening.set_exception(error)
        else:
            self._opened_as = before, layer.state()
            opening.set_result(None)

    def _open(self, layer: Layer) -> None:
        options = self.options
        self.device_names = find_devices(options.devices)
        self._cpu_alone = self.device_names == ["cpu"]
        self.chunk_rows = options.most_chunk_rows(max(self.wire_row_bytes), cpu_alone=self._cpu_alone)
        for dtype in (layer.dtype, self.out_dtype):
            if dtype is FLOAT64 and any(name.startswith("cuda") for name in self.device_names):
                raise DTypeError("float64 is computed on the CPU only; pass devices='cpu', or convert to float32")
        for name in self.device_names:
            self._devices.append(open_device(name))
        self._tuning = Tuning(self._devices)
        self.staging = self._tuning.staging
        self._make_stations(layer)
        self.ceilings = _row_ceilings(self._tuning, self._devices, self.wire_row_bytes)

    def _make_stations(self, layer: Layer) -> None:
        assignment: Assignment | None = None
        for device in self._devices:
            workers = device.workers()
            if workers is None:
                workers = self._workers = self._workers or open_workers(self.staging.workers)
            if assignment is None:
                on_wire = _layer_on_the_wire(layer, self.wire_in, workers)
                assignment = Assignment(on_wire, self.wire_out, self.chunk_rows, self.options.streams)
            self.stations.append(Station(device, workers, assignment, self.staging))

    def state_to_keep(self) -> tuple[Any, ...] | None:
        """The layer's state that the devices have. Waits until opening has ended.

        None where keeping them open doesn't pay, since none has memory of its own, where they aren't open, and where
        the layer was changed while they were opened.
        """
        if self._opening is not None:
            uninterrupted(functools.partial(wait, [self._opening]))
        if self._opened_as is None or not any(device.has_bus for device in self._devices):
            return None
        before, after = self._opened_as
        same = len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
        return before if same else None

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that made it, whose threads and driver aren't here."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """End the worker threads, free pinned and device memory. Safe to call twice; between runs only."""
        if self.forked:
            return
        if self._opening is not None:
            uninterrupted(functools.partial(wait, [self._opening]))
        self._close_devices()

    def _close_devices(self) -> None:
        for station in self.stations:
            station.close()
            station.workers.close()
        if self._workers is not None:
            self._workers.close()
        for device in self._devices:
            device.close()
        self.stations, self._devices, self._workers = [], [], None
        self.gather_buffers = []

    @property
    def pinned_bytes(self) -> int:
        """Pinned memory that it holds."""
        return sum(each.pinned_bytes for each in self.stations) + sum(buffer.nbytes for buffer in self.gather_buffers)

    @property
    def device_bytes(self) -> int:
        """Memory of its devices that it holds, all of them together."""
        return sum(device.allocated_bytes for device in self._devices)

    # -- what a run asks for -------------------------------------------------------------------------------------------

    def is_pinned(self, array: HostArray) -> bool:
        """Whether copy engines can use contiguous memory of the caller's as it is. Waits until the devices are open."""
        self.open()
        return any(device.has_bus and device.in_place(array) for device in self._devices)

    def stations_for(self, source_tensor: Any, out_tensor: Any) -> list[Station]:
        """The devices that take part in a run: with a CUDA tensor at either end, the one that it is on.

        Raises:
            OptionError: none is.
        """
        if source_tensor is not None and self.wire_in is not self.layer.dtype:
            raise OptionError("wire_dtype is for rows that cross the bus, the source is a CUDA tensor; leave it out")
        stations = self.stations
        for what, tensor in (("source", source_tensor), ("out", out_tensor)):
            if tensor is None:
                continue
            name = f"cuda:{tensor.device.index}"
            stations = [station for station in stations if station.device.name == name]
            if not stations:
                raise OptionError(
                    f"{what} is on {name}, this run uses {', '.join(self.device_names)}; pass devices={name!r}, or "
                    f"the tensor's .cpu()"
                )
            stations[0].device.order_after(tensor)
        return stations

    def tune(self, source: Source, sink: Sink) -> None:
        """Measure this machine's copies, once and where the run is large enough, and stage rows as suits them."""
        row_bytes = 0 if source.where == "device" else self.wire_row_bytes[0]
        row_bytes += 0 if sink.where == "device" else self.wire_row_bytes[1]
        if not self._tuning.pays((source.rows or 0) * row_bytes):
            return
        self._tuning.measure(source.memory)
        before, self.staging = self.staging, self._tuning.staging
        old = shared = self._workers
        if old is not None and self.staging.workers != before.workers:
            shared = self._workers = open_workers(self.staging.workers)
        for station in self.stations:
            workers = shared if shared is not None and station.workers is old else station.workers
            station.restage(workers, self.staging)
        if old is not None and old is not shared:
            old.close()
        self.ceilings = _row_ceilings(self._tuning, self._devices, self.wire_row_bytes)

    def ceilings_of(self, recorders: Sequence[Recorder], run_s: float) -> dict[str, Ceilings]:
        """What a run compares with, by the names of its devices, for the bytes that it moved in `run_s` seconds.

        A run of all devices that beat what was measured, and was large enough to tell, raises it first.
        """
        if self._tuning.measured is None:
            return {each.device: self.ceilings[each.device] for each in recorders if each.device in self.ceilings}
        moved_bytes = {stage: sum(each.totals[stage].bytes for each in recorders) for stage in STAGES}
        if len(recorders) == len(self._devices) and self._tuning.raise_to(moved_bytes, run_s):
            self.ceilings = _row_ceilings(self._tuning, self._devices, self.wire_row_bytes)
        found = self._tuning.measured.ceilings(moved_bytes, len(self._devices))
        return {each.device: found for each in recorders}

    def rows_per_chunk(self, rows: int | None, devices: int) -> int:
        """The rows of the chunks of a run of `rows` rows on so many of the devices."""
        return self.options.rows_per_chunk(rows, devices, self.chunk_rows, cpu_alone=self._cpu_alone)

    def gather_depth(self, devices: int) -> int:
        """How many chunk buffers an iterable's rows are gathered in: a chunk leaves its buffer when it is copied to the
        device, so a few are enough for all devices."""
        chunk_bytes = self.chunk_rows * self.wire_row_bytes[0]
        return min(self.options.streams * devices + 1, max(_FEWEST_BUFFERS, _GATHER_BYTES // chunk_bytes))

    def take_gather_buffers(self) -> Callable[[int], HostArray]:
        """Gives a run pinned chunk buffers for a source that gathers rows, those of earlier runs first."""
        unused = list(self.gather_buffers)

        def take(n_bytes: int) -> HostArray:
            if unused:
                return unused.pop()
            self.gather_buffers.append(self._devices[0].pinned(n_bytes))
            return self.gather_buffers[-1]

        return take


def _row_ceilings(tuning: Tuning, devices: Sequence[Device], row_bytes: tuple[int, int]) -> dict[str, Ceilings]:
    """What was measured of the devices, by their names, for rows of so many bytes in and out."""
    if tuning.measured is None:
        return {}
    in_bytes, out_bytes = row_bytes
    of_a_row = {"fill": in_bytes, "H2D": in_bytes, "D2H": out_bytes, "drain": out_bytes}
    found = tuning.measured.ceilings(of_a_row, len(devices))
    return {device.name: found for device in devices}


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, Layer):
        raise OptionError(
            f"layer is a {type(layer).__name__}, expected a FusedLinear; FusedLinear(weight, bias), "
            f"FusedLinear.from_linear and FusedLinear.from_file make one"
        )


def _layer_on_the_wire(layer: Layer, wire: DType, workers: Workers) -> Layer:
    """The layer with its weights in the wire's element type."""
    if wire is layer.dtype:
        return layer

    def narrow(array: HostArray) -> HostArray:
        rounded = np.empty(array.shape, wire.carrier)
        workers.run(Fill(ArrayRows(array, Cast(layer.dtype, wire)), 0, rounded))
        return rounded

    return layer.rounded_to(wire, narrow)
