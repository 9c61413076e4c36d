"""One NVIDIA GPU as a device, through the driver API on the primary context that torch uses as well.

Stream policy: every slot has one stream, and a chunk's copies and its kernel are queued on its slot's. Chunks in
flight therefore overlap, each direction's copy engine takes the chunks in the order of the executor's calls, and no
copy waits for a kernel of another chunk.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import Any

import numpy as np

from pipeline.config import GIB, DType
from pipeline.devices.base import Device, DeviceRows, Operation
from pipeline.errors import DeviceError, DeviceMemoryError, DriverError
from pipeline.kernels.launch import Launcher
from pipeline.kernels.select import Problem, runs_as
from pipeline.layer import FusedLinear, HostArray

_REBASE_S = 30.0  # cuEventElapsedTime gives float32 milliseconds: 2 us of error after 30 s


def _check(result: tuple[Any, ...], call: str) -> Any:
    """The value of a driver call.

    Raises:
        DeviceMemoryError: out of memory. DriverError: any other failure.
    """
    from cuda.bindings import driver

    error = result[0]
    if error != driver.CUresult.CUDA_SUCCESS:
        name = getattr(error, "name", str(error))
        text = driver.cuGetErrorString(error)[1]
        message = f"{call} failed: {name} ({text.decode() if isinstance(text, bytes) else text})"
        if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise DeviceMemoryError(f"{message}; use smaller chunk_rows or num_streams, or free memory on the GPU")
        raise DriverError(message, name)
    return result[1] if len(result) == 2 else result[1:]


def count_gpus() -> int:
    """Visible NVIDIA GPUs; 0 where there is no driver.

    Raises:
        DriverError: there is a driver, but it doesn't work.
    """
    try:
        from cuda.bindings import driver

        result = driver.cuInit(0)
    except (ImportError, RuntimeError, OSError):  # no package, or no libcuda on this machine
        return 0
    if result[0] in (driver.CUresult.CUDA_ERROR_NO_DEVICE, driver.CUresult.CUDA_ERROR_STUB_LIBRARY):
        return 0
    _check(result, "cuInit")
    return int(_check(driver.cuDeviceGetCount(), "cuDeviceGetCount"))


class _EventPool:
    """Timing events, reused; and the base event that ties their times to the host's clock."""

    def __init__(self, stream: Any) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._free: deque[Any] = deque()
        self._all: list[Any] = []
        self._stream = stream
        self.base, self.base_s = self._new_base()

    def _create(self) -> Any:
        event = _check(self._driver.cuEventCreate(0), "cuEventCreate")
        self._all.append(event)
        return event

    def _new_base(self) -> tuple[Any, float]:
        event = self._create()
        _check(self._driver.cuEventRecord(event, self._stream), "cuEventRecord")
        _check(self._driver.cuEventSynchronize(event), "cuEventSynchronize")
        return event, time.perf_counter()

    def record(self, stream: Any) -> Any:
        event = self._free.popleft() if self._free else self._create()
        _check(self._driver.cuEventRecord(event, stream), "cuEventRecord")
        return event

    def release(self, *events: Any) -> None:
        self._free.extend(events)

    def rebase(self) -> None:
        """Take a new base event, timed against the old one, so that float32 milliseconds stay exact enough.

        NOTE: the old base is kept for the operations that still refer to it; one event each 30 s.
        """
        if time.perf_counter() - self.base_s > _REBASE_S:
            event = self.record(self._stream)
            _check(self._driver.cuEventSynchronize(event), "cuEventSynchronize")
            self.base_s += self.elapsed_s(self.base, event)
            self.base = event

    def elapsed_s(self, start: Any, end: Any) -> float:
        return float(_check(self._driver.cuEventElapsedTime(start, end), "cuEventElapsedTime")) * 1e-3

    def close(self) -> None:
        for event in self._all:
            self._driver.cuEventDestroy(event)
        self._all.clear()
        self._free.clear()


class _CudaOperation:
    """Work between two timing events on a stream. `what` goes into error messages."""

    def __init__(self, pool: _EventPool, start: Any, end: Any, what: str) -> None:
        self._pool, self._start, self._end, self._what = pool, start, end, what
        self._base, self._base_s = pool.base, pool.base_s
        self._times: tuple[float, float] | None = None

    def done(self) -> bool:
        if self._times is not None:
            return True
        driver = self._pool._driver
        result = driver.cuEventQuery(self._end)
        if result[0] == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        _check(result, self._what)
        elapsed = self._pool.elapsed_s
        self._times = (
            self._base_s + elapsed(self._base, self._start),
            self._base_s + elapsed(self._base, self._end),
        )
        self._pool.release(self._start, self._end)
        return True

    def times(self) -> tuple[float, float]:
        if self._times is None:
            raise DeviceError(f"{self._what} isn't done yet")
        return self._times


class CudaDevice(Device):
    """GPU `ordinal`. Holds device memory for the weights and the slots, pinned host memory, streams and events."""

    def __init__(self, ordinal: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._pid = os.getpid()
        self._launcher = Launcher.for_device(ordinal)
        self.ordinal = ordinal
        self.name = f"cuda:{ordinal}"
        self.description = f"{self._launcher.name} ({self._launcher.arch})"
        self._weights: list[int] = []
        self._buffers: list[int] = []
        self._pinned: list[int] = []
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._streams: list[Any] = []
        self._control = self._new_stream()
        self._events = _EventPool(self._control)

    def _new_stream(self) -> Any:
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return _check(self._driver.cuStreamCreate(flags), "cuStreamCreate")

    def bind(self) -> None:
        """Make the GPU's primary context current in this thread.

        Raises:
            DeviceError: in a process forked after CUDA was started.
        """
        if os.getpid() != self._pid:
            raise DeviceError(
                "this process was forked after CUDA had started, and CUDA doesn't survive a fork: "
                "start workers with the 'spawn' method, or open the Pipeline in the child"
            )
        Launcher.for_device(self.ordinal)

    def now(self) -> float:
        return time.perf_counter()

    def free_bytes(self) -> int | None:
        self.bind()
        return int(_check(self._driver.cuMemGetInfo(), "cuMemGetInfo")[0])

    def _allocate(self, n_bytes: int, owner: list[int], what: str) -> int:
        try:
            address = int(_check(self._driver.cuMemAlloc(max(1, n_bytes)), "cuMemAlloc"))
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{what} needs {n_bytes / GIB:.2f} GiB on {self.name}, {(self.free_bytes() or 0) / GIB:.2f} GiB are "
                f"free; use smaller chunk_rows or num_streams, or free memory on the GPU"
            ) from error
        owner.append(address)
        return address

    def prepare(self, layer: FusedLinear, out_dtype: DType, chunk_rows: int) -> None:
        self.bind()
        problem = Problem(layer.dtype, out_dtype, layer.precision, layer.in_features, layer.out_features)
        self.kernel = self._launcher.prepare(problem, chunk_rows, layer.in_features, layer.in_features)
        self.runs_as = runs_as(problem)
        self._layer, self._problem = layer, problem
        self._in_row_bytes = layer.in_features * layer.dtype.itemsize
        self._out_row_bytes = layer.out_features * out_dtype.itemsize
        self._out_itemsize = out_dtype.itemsize
        self._w = self._upload_weights(layer.weight, "the weight")
        self._bias = 0 if layer.bias is None else self._upload_weights(layer.bias, "the bias")

    def _upload_weights(self, array: HostArray, what: str) -> int:
        address = self._allocate(array.nbytes, self._weights, what)
        _check(self._driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes), "cuMemcpyHtoD")
        return address

    def allocate(self, chunk_rows: int, num_streams: int) -> None:
        self.bind()
        for slot in range(num_streams):
            self._inputs.append(self._allocate(chunk_rows * self._in_row_bytes, self._buffers, f"input chunk {slot}"))
            self._outputs.append(
                self._allocate(chunk_rows * self._out_row_bytes, self._buffers, f"output chunk {slot}")
            )
            self._streams.append(self._new_stream())

    def pinned(self, n_bytes: int) -> HostArray:
        self.bind()
        flags = self._driver.CU_MEMHOSTALLOC_PORTABLE
        address = int(_check(self._driver.cuMemHostAlloc(max(1, n_bytes), flags), "cuMemHostAlloc"))
        self._pinned.append(address)
        return _memory_at(address, n_bytes)

    def in_place(self, rows: HostArray) -> bool:
        """Whether the first and the last byte of `rows` are pinned memory, as the driver knows it."""
        first = rows.__array_interface__["data"][0]
        return self._is_pinned(first) and self._is_pinned(first + rows.nbytes - 1)

    def _is_pinned(self, address: int) -> bool:
        attribute = self._driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        result = self._driver.cuPointerGetAttribute(attribute, address)
        if result[0] == self._driver.CUresult.CUDA_ERROR_INVALID_VALUE:  # memory that CUDA doesn't know: pageable
            return False
        kind = _check(result, "cuPointerGetAttribute")
        return bool(int(kind) == int(self._driver.CUmemorytype.CU_MEMORYTYPE_HOST))

    def _timed(self, stream: Any, what: str, call: str, queue: Any) -> Operation:
        start = self._events.record(stream)
        result = queue()
        if result is not None:
            _check(result, call)
        return _CudaOperation(self._events, start, self._events.record(stream), what)

    def upload(self, slot: int, first: int, rows: HostArray) -> Operation:
        stream, target = self._streams[slot], self._inputs[slot] + first * self._in_row_bytes
        return self._timed(
            stream,
            f"H2D copy on stream {slot}",
            "cuMemcpyHtoDAsync",
            lambda: self._driver.cuMemcpyHtoDAsync(target, rows.__array_interface__["data"][0], rows.nbytes, stream),
        )

    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        layer, stream = self._layer, self._streams[slot]
        return self._timed(
            stream,
            f"kernel on stream {slot}",
            "launch",
            lambda: self._launcher.launch(
                int(stream),
                self._problem,
                rows=rows,
                x=self._inputs[slot] if source is None else source.address,
                x_stride=layer.in_features if source is None else source.stride,
                w=self._w,
                w_stride=layer.in_features,
                bias=self._bias,
                y=self._outputs[slot] if target is None else target.address,
                y_stride=layer.out_features if target is None else target.stride,
                scaling_factor=layer.scaling_factor,
            ),
        )

    def download(self, slot: int, first: int, rows: HostArray) -> Operation:
        stream, source = self._streams[slot], self._outputs[slot] + first * self._out_row_bytes
        return self._timed(
            stream,
            f"D2H copy on stream {slot}",
            "cuMemcpyDtoHAsync",
            lambda: self._driver.cuMemcpyDtoHAsync(rows.__array_interface__["data"][0], source, rows.nbytes, stream),
        )

    def order_after(self, tensor: Any) -> None:
        import torch

        self.bind()
        event = self._events.record(torch.cuda.current_stream(tensor.device).cuda_stream)
        for stream in self._streams:
            _check(self._driver.cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent")

    def idle(self) -> None:
        self._events.rebase()
        time.sleep(5e-6)

    def synchronize(self) -> None:
        self.bind()
        for stream in self._streams:
            _check(self._driver.cuStreamSynchronize(stream), "cuStreamSynchronize")

    def close(self) -> None:
        """Free everything. Errors of the driver are of no use any more and are not raised: a lost GPU frees nothing."""
        if os.getpid() != self._pid or self._control is None:
            return
        self.bind()
        for stream in [*self._streams, self._control]:
            self._driver.cuStreamSynchronize(stream)
            self._driver.cuStreamDestroy(stream)
        self._events.close()
        for address in self._weights + self._buffers:
            self._driver.cuMemFree(address)
        for address in self._pinned:
            self._driver.cuMemFreeHost(address)
        self._control = None
        self._streams, self._weights, self._buffers, self._pinned = [], [], [], []
        self._inputs, self._outputs = [], []


def _memory_at(address: int, n_bytes: int) -> HostArray:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))
