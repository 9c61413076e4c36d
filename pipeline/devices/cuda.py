"""One NVIDIA GPU as a device, through the driver API on the primary context that torch uses as well.

Stream policy: all copies to the GPU share one stream, all copies back another one, and every slot has a stream for its
kernels. What is queued waits for the operation before it on its slot, if that is on another stream and wasn't seen to
be done. Each copy engine therefore finds its next copy right behind the last one, chunks in flight overlap, and a copy
waits for no kernel but its own chunk's and, on the way back, those of the chunks before it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np

from pipeline.arrays import HostArray, address_of
from pipeline.config import GIB
from pipeline.devices.base import Device, NativeCopies
from pipeline.dtypes import DType
from pipeline.errors import DeviceError, DeviceMemoryError
from pipeline.flow import DeviceRows, Operation
from pipeline.kernels.choose import Problem, runs_as
from pipeline.kernels.driver import call, call_error, check_not_forked, count_gpus, driver
from pipeline.kernels.launch import Launcher, in_context
from pipeline.kernels.split import PreparedSplit, SplitRows, is_split, prepare_split_launch
from pipeline.layer.forward import ALIGNMENT_BYTES
from pipeline.layer.linear import FusedLinear

__all__ = ["CudaDevice", "count_gpus"]

_DRIVER_API = 12000  # the version of the driver's functions that csrc/host/mover.c calls, which are:
_FOR_C = ("cuCtxSetCurrent", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventQuery")
_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30  # linux/prctl.h
# NOTE: times mix two clocks, starts of the host's and ends of the GPU's. Clocks differ by some 1e-5 (not measured
# here): by 3 us after this long.
_REBASE_S = 0.25


class _Base:
    """A moment on both clocks: an event, and when it was on the host's."""

    __slots__ = ("event", "host_s", "needed_by")

    def __init__(self, event: Any, host_s: float) -> None:
        self.event, self.host_s = event, host_s
        self.needed_by = 0  # operations


class _EventPool:
    """Timing events, reused; and the base that ties their times to the host's clock."""

    def __init__(self, stream: Any) -> None:
        self._free: deque[Any] = deque()
        self._all: list[Any] = []
        self._stream = stream
        self._record = driver().cuEventRecord
        self.base = self._new_base()
        self._old_bases: list[_Base] = []

    def _create(self) -> Any:
        event = call("cuEventCreate", 0)
        self._all.append(event)
        return event

    def _new_base(self) -> _Base:
        """Of some moments, the one that two readings of the host's clock enclose best."""
        best: _Base | None = None
        best_s = float("inf")
        for _ in range(3):
            before_s = time.perf_counter()
            event = self.record(self._stream)
            call("cuEventSynchronize", event)
            after_s = time.perf_counter()
            unused = event
            if after_s - before_s < best_s:
                unused = None if best is None else best.event
                best, best_s = _Base(event, (before_s + after_s) / 2), after_s - before_s
            if unused is not None:
                self.release(unused)
        assert best is not None
        return best

    def record(self, stream: Any) -> Any:
        event = self._free.popleft() if self._free else self._create()
        (code,) = self._record(event, stream)
        if code != 0:
            raise call_error("cuEventRecord", code)
        return event

    def release(self, event: Any) -> None:
        self._free.append(event)

    def rebase(self) -> None:
        """Take a new base where this one has aged: the two clocks drift apart, and events are far from it."""
        if time.perf_counter() - self.base.host_s < _REBASE_S:
            return
        self._old_bases.append(self.base)
        self.base = self._new_base()
        for base in [base for base in self._old_bases if not base.needed_by]:
            self._old_bases.remove(base)
            self.release(base.event)

    def elapsed_s(self, start: Any, end: Any) -> float:
        return float(call("cuEventElapsedTime", start, end)) * 1e-3

    def close(self) -> None:
        for event in self._all:
            driver().cuEventDestroy(event)
        self._all.clear()
        self._free.clear()


class _CudaOperation:
    """Work on a stream, up to an event behind it. `what` goes into error messages.

    It started when it was queued, or when the last of `before` ended: what its slot and its engine did before it.
    NOTE: an event before the work would tell as much, for another 2.5 us of the executor's loop (H200 host: 1.8 to
    record it, 0.7 to ask for its time): under nsys, kernels started 16 us after such an event, and after the copy that
    they waited for 17 (H100).
    """

    __slots__ = ("_base", "_before", "_end", "_pool", "_queued_s", "_stream", "_times", "_what")

    def __init__(self, pool: _EventPool, stream: Any, what: str, queued_s: float, before: list[_CudaOperation]) -> None:
        self._pool, self._stream, self._what, self._queued_s, self._before = pool, stream, what, queued_s, before
        self._end = pool.record(stream)
        self._base = pool.base
        self._base.needed_by += 1
        self._times: tuple[float, float] | None = None

    def done(self) -> bool:
        if self._times is not None:
            return True
        api = driver()
        (code,) = api.cuEventQuery(self._end)
        if code == api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if code != 0:
            raise call_error(self._what, code)
        end_s = self._base.host_s + self._pool.elapsed_s(self._base.event, self._end)
        starts = [self._queued_s] + [before.times()[1] for before in self._before if before.done()]
        self._set_times(min(max(starts), end_s), end_s)
        return True

    def _set_times(self, start_s: float, end_s: float) -> None:
        """It is done; give back what told it."""
        self._times = start_s, end_s
        self._pool.release(self._end)
        self._base.needed_by -= 1
        self._before = []

    def hold(self, stream: Any) -> None:
        """Let what is queued on `stream` from now on wait for this operation."""
        if self._times is None and stream is not self._stream:
            call("cuStreamWaitEvent", stream, self._end, 0)

    def times(self) -> tuple[float, float]:
        if self._times is None:
            raise DeviceError(f"{self._what} isn't done yet")
        return self._times


Method = TypeVar("Method", bound=Callable[..., Any])


def _on_this_gpu(method: Method) -> Method:
    """A method of a device that may be called while another GPU, or none, is current in the calling thread: that one is
    current again afterwards.

    Raises:
        DeviceError: in a process forked after CUDA was started.
    """

    @functools.wraps(method)
    def on_this_gpu(self: CudaDevice, *arguments: Any) -> Any:
        with self._current():
            return method(self, *arguments)

    return cast(Method, on_this_gpu)


class CudaDevice(Device):
    """GPU `ordinal`. Holds device memory for the weights and the slots, pinned host memory, streams and events."""

    has_bus = True

    def __init__(self, ordinal: int) -> None:
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
        self._w_split: SplitRows | None = None  # of the fp32-accurate kernel: the weights' parts
        self._x_splits: list[SplitRows] = []
        self._latest: dict[str | int, _CudaOperation] = {}  # of each engine and of each slot
        self._kernel_streams: list[Any] = []  # of each slot
        self._plain_events: list[Any] = []
        self._slot_events: dict[int, int] = {}  # behind kernels
        with self._current():
            self._control, self._h2d, self._d2h = (self._new_stream() for _ in range(3))
            self._events = _EventPool(self._control)

    def _new_stream(self) -> Any:
        return call("cuStreamCreate", driver().CUstream_flags.CU_STREAM_NON_BLOCKING)

    def _current(self) -> AbstractContextManager[None]:
        """This GPU is the calling thread's current one inside."""
        check_not_forked()
        return in_context(self._launcher.context)

    def now(self) -> float:
        return time.perf_counter()

    @_on_this_gpu
    def free_bytes(self) -> int | None:
        return int(call("cuMemGetInfo")[0])

    def _allocate(self, n_bytes: int, owner: list[int], what: str) -> int:
        try:
            address = int(call("cuMemAlloc", max(1, n_bytes)))
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{what} needs {n_bytes / GIB:.2f} GiB on {self.name}, {(self.free_bytes() or 0) / GIB:.2f} GiB are "
                f"free; use smaller chunk_rows or num_streams, or free memory on the GPU"
            ) from error
        owner.append(address)
        return address

    @_on_this_gpu
    def prepare(self, layer: FusedLinear, out_dtype: DType, chunk_rows: int) -> None:
        problem = Problem(layer.dtype, out_dtype, layer.precision, layer.in_features, layer.out_features)
        self.runs_as = runs_as(problem, self._launcher.arch)
        self._layer, self._problem = layer, problem
        self._in_row_bytes = layer.in_features * layer.dtype.itemsize
        self._pitch_bytes = -(-self._in_row_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # of rows in device memory
        self._stride = self._pitch_bytes // layer.dtype.itemsize
        self._out_row_bytes = layer.out_features * out_dtype.itemsize
        self.kernel = self._launcher.prepare(problem, chunk_rows, self._stride, self._stride)
        self._w = self._allocate(layer.out_features * self._pitch_bytes, self._weights, "the weight")
        self._copy_rows(self._w, layer.weight, self._control)
        call("cuStreamSynchronize", self._control)
        self._split_weights()
        self._bias = 0 if layer.bias is None else self._upload_bias(layer.bias)

    def _split_weights(self) -> None:
        """For the fp32-accurate kernel: the weights' parts, and a count of the rows that needed exact fp32."""
        if not is_split(self._launcher, self._problem):
            return
        layer = self._layer
        self._w_split = self._allocate_split(layer.out_features, self._weights, "the weight's parts")
        self._exact_rows = self._allocate(8, self._weights, "a counter")
        call("cuMemsetD32Async", self._exact_rows, 0, 2, self._control)
        split = PreparedSplit(self._launcher, self._w, self._stride, layer.out_features, self._w_split)
        split.queue(int(self._control))
        call("cuStreamSynchronize", self._control)

    def _allocate_split(self, rows: int, owner: list[int], what: str) -> SplitRows:
        unplaced = SplitRows(0, rows, self._layer.in_features)
        return replace(unplaced, address=self._allocate(unplaced.n_bytes, owner, what))

    @_on_this_gpu
    def exact_rows(self) -> int:
        if self._w_split is None:
            return 0
        count = np.zeros(1, np.uint64)
        call("cuMemcpyDtoH", count.ctypes.data, self._exact_rows, 8)
        return int(count[0])

    def _upload_bias(self, array: HostArray) -> int:
        address = self._allocate(array.nbytes, self._weights, "the bias")
        call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._control)
        call("cuStreamSynchronize", self._control)
        return address

    @_on_this_gpu
    def allocate(self, chunk_rows: int, num_streams: int) -> None:
        for slot in range(num_streams):
            self._inputs.append(self._allocate(chunk_rows * self._pitch_bytes, self._buffers, f"input chunk {slot}"))
            self._outputs.append(
                self._allocate(chunk_rows * self._out_row_bytes, self._buffers, f"output chunk {slot}")
            )
            if self._w_split is not None:
                self._x_splits.append(self._allocate_split(chunk_rows, self._buffers, f"parts of chunk {slot}"))
            self._kernel_streams.append(self._new_stream())

    @_on_this_gpu
    def pinned(self, n_bytes: int) -> HostArray:
        address = int(call("cuMemHostAlloc", max(1, n_bytes), driver().CU_MEMHOSTALLOC_PORTABLE))
        self._pinned.append(address)
        return _memory_at(address, n_bytes)

    @_on_this_gpu
    def free_pinned(self, memory: HostArray) -> None:
        address = address_of(memory)
        self._pinned.remove(address)
        call("cuMemFreeHost", address)

    @_on_this_gpu
    def in_place(self, rows: HostArray) -> bool:
        """Whether the first and the last byte of `rows` are pinned memory, as the driver knows it."""
        first = address_of(rows)
        return _is_pinned(first) and _is_pinned(first + rows.nbytes - 1)

    @property
    def _streams(self) -> list[Any]:
        """Those that operations of slots are queued on."""
        return [self._h2d, self._d2h, *self._kernel_streams]

    def _queue(self, slot: int, engine: str, stream: Any, queue: Callable[[], None]) -> Operation:
        """Let `queue` queue an engine's work on the stream, behind the slot's latest operation; an event after it."""
        latest, queued_s = self._latest, time.perf_counter()
        if slot in latest:
            latest[slot].hold(stream)
        queue()
        before = [latest[key] for key in (engine, slot) if key in latest]
        operation = _CudaOperation(self._events, stream, f"{engine} of slot {slot}", queued_s, before)
        latest[engine] = latest[slot] = operation
        return operation

    def upload(self, slot: int, first: int, rows: HostArray) -> Operation:
        target = self._inputs[slot] + first * self._pitch_bytes
        return self._queue(slot, "H2D copy", self._h2d, lambda: self._copy_rows(target, rows, self._h2d))

    def _copy_rows(self, target: int, rows: HostArray, stream: Any) -> None:
        """Queue a copy of contiguous host rows to rows `_pitch_bytes` apart."""
        source = address_of(rows)
        if self._pitch_bytes == self._in_row_bytes:
            call("cuMemcpyHtoDAsync", target, source, rows.nbytes, stream)
            return
        copy = driver().CUDA_MEMCPY2D()
        copy.srcMemoryType = driver().CUmemorytype.CU_MEMORYTYPE_HOST
        copy.srcHost, copy.srcPitch = source, self._in_row_bytes
        self._copy_2d(copy, target, rows.nbytes // self._in_row_bytes, stream)

    def _copy_2d(self, copy: Any, target: int, rows: int, stream: Any) -> None:
        copy.dstMemoryType = driver().CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.dstDevice, copy.dstPitch = target, self._pitch_bytes
        copy.WidthInBytes, copy.Height = self._in_row_bytes, rows
        call("cuMemcpy2DAsync", copy, stream)

    def _align_rows(self, target: int, source: DeviceRows, stride_bytes: int, rows: int, stream: Any) -> None:
        """Queue a copy of rows in device memory to where the fastest kernel can read them."""
        copy = driver().CUDA_MEMCPY2D()
        copy.srcMemoryType = driver().CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = source.address, stride_bytes
        self._copy_2d(copy, target, rows, stream)

    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        layer, stream = self._layer, self._kernel_streams[slot]
        x, x_stride = self._inputs[slot], self._stride
        stride_bytes = 0 if source is None else source.stride * layer.dtype.itemsize
        aligned = source is None or (source.address | stride_bytes) % ALIGNMENT_BYTES == 0
        if source is not None and aligned:
            x, x_stride = source.address, source.stride
        operands: dict[str, Any] = {
            "rows": rows,
            "x": x,
            "x_stride": x_stride,
            "w": self._w,
            "w_stride": self._stride,
            "bias": self._bias,
            "y": self._outputs[slot] if target is None else target.address,
            "y_stride": layer.out_features if target is None else target.stride,
            "scaling_factor": layer.scaling_factor,
        }

        if self._w_split is None:
            launch = functools.partial(self._launcher.launch, int(stream), self._problem, **operands)
        else:
            operands["x_split"], operands["w_split"] = self._x_splits[slot], self._w_split
            prepared = prepare_split_launch(self._launcher, self._problem, **operands, total_wide=self._exact_rows)
            launch = functools.partial(prepared.queue, int(stream))

        def queue() -> None:
            if source is not None and not aligned:
                self._align_rows(x, source, stride_bytes, rows, stream)
            launch()

        return self._queue(slot, "kernel", stream, queue)

    def download(self, slot: int, first: int, rows: HostArray) -> Operation:
        source, target = self._outputs[slot] + first * self._out_row_bytes, address_of(rows)
        copy = functools.partial(call, "cuMemcpyDtoHAsync", target, source, rows.nbytes, self._d2h)
        return self._queue(slot, "D2H copy", self._d2h, copy)

    def native_copies(self) -> NativeCopies | None:
        if self._pitch_bytes != self._in_row_bytes:  # rows that no single copy can move
            return None
        return NativeCopies(
            functions=tuple(map(_function, _FOR_C)),
            context=int(self._launcher.context),
            in_stream=int(self._h2d),
            out_stream=int(self._d2h),
            new_event=self._new_plain_event,
            input=self._inputs.__getitem__,
            output=self._outputs.__getitem__,
            before_kernel=lambda slot, event: call("cuStreamWaitEvent", self._kernel_streams[slot], event, 0),
            after_kernel=self._after_kernel,
            error=lambda what, code: call_error(what, driver().CUresult(code)),
        )

    @_on_this_gpu
    def _new_plain_event(self) -> int:
        """An event without a time, which lives as long as the device."""
        self._plain_events.append(call("cuEventCreate", driver().CUevent_flags.CU_EVENT_DISABLE_TIMING))
        return int(self._plain_events[-1])

    def _after_kernel(self, slot: int) -> int:
        """An event behind the slot's last kernel, one for each slot."""
        if slot not in self._slot_events:
            self._slot_events[slot] = self._new_plain_event()
        call("cuEventRecord", self._slot_events[slot], self._kernel_streams[slot])
        return self._slot_events[slot]

    def for_copies(self, row_bytes: int, chunk_rows: int, num_streams: int) -> Device:
        probe = _CopiesOnly(self.ordinal, row_bytes)
        try:
            probe.allocate(chunk_rows, num_streams)
        except BaseException:
            probe.close()
            raise
        return probe

    @_on_this_gpu
    def order_after(self, tensor: Any) -> None:
        import torch

        event = self._events.record(torch.cuda.current_stream(tensor.device).cuda_stream)
        for stream in self._streams:
            call("cuStreamWaitEvent", stream, event, 0)
        self._events.release(event)  # the streams wait for what it recorded, however it is used next

    @contextmanager
    def running(self) -> Iterator[None]:
        """This GPU is current, and short sleeps are short."""
        with self._current(), _short_sleeps():
            self._events.rebase()
            yield

    def idle(self) -> None:
        self._events.rebase()
        time.sleep(5e-6)

    @_on_this_gpu
    def synchronize(self) -> None:
        try:
            for stream in self._streams:
                call("cuStreamSynchronize", stream)
        finally:
            self._latest.clear()

    def close(self) -> None:
        """Free everything. Errors of the driver are of no use any more and are not raised: a lost GPU frees nothing."""
        if os.getpid() != self._pid or self._control is None:
            return
        with self._current():
            self._free_all()

    def _free_all(self) -> None:
        api = driver()
        for stream in [*self._streams, self._control]:
            api.cuStreamSynchronize(stream)
            api.cuStreamDestroy(stream)
        self._events.close()
        for event in self._plain_events:
            api.cuEventDestroy(event)
        for address in self._weights + self._buffers:
            api.cuMemFree(address)
        for address in self._pinned:
            api.cuMemFreeHost(address)
        self._control = None
        self._kernel_streams, self._weights, self._buffers, self._pinned = [], [], [], []
        self._inputs, self._outputs, self._x_splits, self._plain_events = [], [], [], []


class _CopiesOnly(CudaDevice):
    """The same GPU with kernels that do nothing."""

    def __init__(self, ordinal: int, row_bytes: int) -> None:
        super().__init__(ordinal)
        self._in_row_bytes = self._out_row_bytes = self._pitch_bytes = row_bytes

    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        return self._queue(slot, "kernel", self._kernel_streams[slot], lambda: None)


@contextmanager
def _short_sleeps() -> Iterator[None]:
    """By default Linux lets a thread sleep for 50 us longer than it asks for."""
    prctl = _prctl()
    if prctl is None:
        yield
        return
    slack_ns = prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0)
    prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_TIMERSLACK, slack_ns, 0, 0, 0)


@functools.cache
def _prctl() -> Any:
    """Linux's function of this name, None elsewhere."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = (ctypes.c_int, *4 * (ctypes.c_ulong,))
    return prctl


@functools.cache
def _function(name: str) -> int:
    """The address of a function of the driver's."""
    address, _ = call("cuGetProcAddress", name.encode(), _DRIVER_API, 0)
    return int(address)


def is_pinned(address: int) -> bool:
    """Whether the host memory at `address` is pinned, as the driver knows it."""
    with in_context(Launcher.for_device(0).context):
        return _is_pinned(address)


def _is_pinned(address: int) -> bool:
    api = driver()
    code, kind = api.cuPointerGetAttribute(api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
    if code == api.CUresult.CUDA_ERROR_INVALID_VALUE:  # memory that CUDA doesn't know: pageable
        return False
    if code != 0:
        raise call_error("cuPointerGetAttribute", code)
    return bool(int(kind) == int(api.CUmemorytype.CU_MEMORYTYPE_HOST))


def register(address: int, n_bytes: int, *, read_only: bool) -> None:
    """Pin the caller's host memory for all GPUs, until `unregister`. Blocks.

    Raises:
        DriverError: the driver refused.
    """
    with in_context(Launcher.for_device(0).context):
        api = driver()
        flags = api.CU_MEMHOSTREGISTER_PORTABLE | (api.CU_MEMHOSTREGISTER_READ_ONLY if read_only else 0)
        (code,) = api.cuMemHostRegister(address, n_bytes, flags)
    if code != 0:
        error = call_error(f"pinning {n_bytes / GIB:.2f} GiB of {'read-only ' if read_only else ''}host memory", code)
        error.add_note(
            "pipeline: writable maps of files can't be pinned, nor can memory that shares a page with memory pinned "
            "before; ulimit -l may limit locked memory. Without pin() it is staged"
        )
        raise error


def unregister(address: int) -> None:
    """End what `register` did. Nothing may be using the memory any more.

    Raises:
        DriverError: the driver refused.
    """
    with in_context(Launcher.for_device(0).context):
        call("cuMemHostUnregister", address)


def _memory_at(address: int, n_bytes: int) -> HostArray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))
