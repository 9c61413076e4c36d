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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from pipeline.arrays import HostArray, address_of
from pipeline.devices.base import Device, NativeCopies, NoLayer, layer_at
from pipeline.devices.cuda_events import CudaOperation, EventPool, PlainEvents
from pipeline.devices.cuda_memory import (
    CudaMemory,
    CudaPlace,
    PitchedRows,
    is_pinned,
    is_pinned_here,
    register,
    unregister,
)
from pipeline.dtypes import DType
from pipeline.kernels.driver import call, call_error, check_not_forked, count_gpus, driver
from pipeline.kernels.launch import Launcher, in_context
from pipeline.layer.base import ALIGNMENT_BYTES, DeviceLayer, Layer
from pipeline.pages import touch
from pipeline.rows import DeviceRows, Operation

__all__ = ["CudaDevice", "count_gpus", "is_pinned", "register", "unregister"]

_DRIVER_API = 12000  # the version of the driver's functions that csrc/host/mover.c calls, which are:
_FOR_C = ("cuCtxSetCurrent", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventQuery")
_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30  # linux/prctl.h

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
        self._layer: DeviceLayer = NoLayer()
        self._memory = CudaMemory(self.name)
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._scratch: list[int] = []  # the layer's own, by slot
        self._latest: dict[str | int, CudaOperation] = {}  # by engine and by slot
        self._kernel_streams: list[Any] = []  # by slot
        with self._current():
            self._control, self._h2d, self._d2h = _new_stream(), _new_stream(), _new_stream()
            self._events, self._plain_events = EventPool(self._control), PlainEvents()

    def _current(self) -> AbstractContextManager[None]:
        """This GPU is the calling thread's current one inside."""
        check_not_forked()
        return in_context(self._launcher.context)

    @_on_this_gpu
    def free_bytes(self) -> int | None:
        return self._memory.free_bytes()

    @_on_this_gpu
    def prepare(self, layer: Layer, out_dtype: DType, chunk_rows: int) -> None:
        self._itemsize = layer.dtype.itemsize
        self._rows_in = PitchedRows.aligned(layer.in_features * self._itemsize)
        self._out_features, self._out_row_bytes = layer.out_features, layer.out_features * out_dtype.itemsize
        place = CudaPlace(self.ordinal, self._memory, self._control, self.uploader)
        self._layer = layer_at(place, layer, out_dtype, chunk_rows)
        call("cuStreamSynchronize", self._control)
        self.kernel, self.runs_as = self._layer.kernel, self._layer.runs_as

    @_on_this_gpu
    def exact_rows(self) -> int:
        return self._layer.exact_rows()

    @_on_this_gpu
    def allocate(self, chunk_rows: int, num_streams: int) -> None:
        allocate, scratch_bytes = self._memory.allocate, self._layer.slot_bytes(chunk_rows)
        for slot in range(num_streams):
            self._inputs.append(allocate(chunk_rows * self._rows_in.pitch_bytes, f"input chunk {slot}"))
            self._outputs.append(allocate(chunk_rows * self._out_row_bytes, f"output chunk {slot}"))
            self._scratch.append(allocate(scratch_bytes, f"parts of chunk {slot}") if scratch_bytes else 0)
            self._kernel_streams.append(_new_stream())
        self.allocated_bytes = self._memory.allocated_bytes

    @_on_this_gpu
    def pinned(self, n_bytes: int) -> HostArray:
        return self._memory.pinned(n_bytes, touch if self.uploader is None else self.uploader.touch)

    @_on_this_gpu
    def free_pinned(self, memory: HostArray) -> None:
        self._memory.free_pinned(memory)

    @_on_this_gpu
    def in_place(self, rows: HostArray) -> bool:
        """Whether the first and the last byte of `rows` are pinned memory, as the driver knows it."""
        first = address_of(rows)
        return is_pinned_here(first) and is_pinned_here(first + rows.nbytes - 1)

    def _queue(self, slot: int, engine: str, stream: Any, queue: Callable[[], None]) -> Operation:
        """Let `queue` queue an engine's work on the stream, behind the slot's latest operation; an event after it."""
        latest, queued_s = self._latest, time.perf_counter()
        if slot in latest:
            latest[slot].hold(stream)
        queue()
        before = [latest[key] for key in (engine, slot) if key in latest]
        operation = CudaOperation(self._events, stream, f"{engine} of slot {slot}", queued_s, before)
        latest[engine] = latest[slot] = operation
        return operation

    def upload(self, slot: int, first: int, rows: HostArray) -> Operation:
        target = self._inputs[slot] + first * self._rows_in.pitch_bytes
        return self._queue(slot, "H2D copy", self._h2d, lambda: self._rows_in.copy_in(target, rows, self._h2d))

    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        stream, scratch = self._kernel_streams[slot], self._scratch[slot]
        x = DeviceRows(self.ordinal, self._inputs[slot], self._rows_in.pitch_bytes // self._itemsize, rows, None)
        y = target or DeviceRows(self.ordinal, self._outputs[slot], self._out_features, rows, None)
        pitch_bytes = 0 if source is None else source.stride * self._itemsize
        if source is not None and (source.address | pitch_bytes) % ALIGNMENT_BYTES == 0:
            x, source = source, None

        def queue() -> None:
            if source is not None:  # to where the fastest kernel can read the rows
                self._rows_in.copy_on_device(x.address, source.address, pitch_bytes, rows, stream)
            self._layer.queue(x, y, dataset_row, int(stream), scratch)

        return self._queue(slot, "kernel", stream, queue)

    def download(self, slot: int, first: int, rows: HostArray) -> Operation:
        source, target = self._outputs[slot] + first * self._out_row_bytes, address_of(rows)
        copy = functools.partial(call, "cuMemcpyDtoHAsync", target, source, rows.nbytes, self._d2h)
        return self._queue(slot, "D2H copy", self._d2h, copy)

    def native_copies(self) -> NativeCopies | None:
        if not self._rows_in.packed:  # rows that no single copy can move
            return None

        def new_event() -> int:
            with self._current():
                return self._plain_events.new()

        return NativeCopies(
            functions=tuple(map(_function, _FOR_C)),
            context=int(self._launcher.context),
            in_stream=int(self._h2d),
            out_stream=int(self._d2h),
            new_event=new_event,
            input=self._inputs.__getitem__,
            output=self._outputs.__getitem__,
            before_kernel=lambda slot, event: call("cuStreamWaitEvent", self._kernel_streams[slot], event, 0),
            after_kernel=lambda slot: self._plain_events.after_kernel(slot, self._kernel_streams[slot]),
            error=lambda what, code: call_error(what, driver().CUresult(code)),
        )

    def for_copies(self, row_bytes: int, chunk_rows: int, num_streams: int) -> Device:
        probe = CudaDevice(self.ordinal)  # whose layer does nothing
        probe._itemsize, probe._rows_in = 1, PitchedRows(row_bytes, row_bytes)
        probe._out_features = probe._out_row_bytes = row_bytes
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
        for stream in (self._h2d, self._d2h, *self._kernel_streams):
            call("cuStreamWaitEvent", stream, event, 0)
        self._events.release(event)  # the streams wait for what it recorded, however it is used next

    @contextmanager
    def running(self) -> Iterator[None]:
        """This GPU is current, and short sleeps are short."""
        with self._current(), _short_sleeps():
            self._events.renew_anchor()
            yield

    def idle(self) -> None:
        self._events.renew_anchor()
        time.sleep(5e-6)

    @_on_this_gpu
    def synchronize(self) -> None:
        try:
            for stream in (self._h2d, self._d2h, *self._kernel_streams):
                call("cuStreamSynchronize", stream)
        finally:
            self._latest.clear()

    def close(self) -> None:
        """Free everything. Errors of the driver are of no use any more and are not raised: a lost GPU frees nothing."""
        if os.getpid() != self._pid or self._control is None:
            return
        api = driver()
        with self._current():
            for stream in (self._h2d, self._d2h, *self._kernel_streams, self._control):
                api.cuStreamSynchronize(stream)
                api.cuStreamDestroy(stream)
            self._events.close()
            self._plain_events.close()
            self._layer.close()
            self._memory.close()
        self._control, self._layer = None, NoLayer()
        self._kernel_streams, self._inputs, self._outputs, self._scratch = [], [], [], []


def _new_stream() -> Any:
    return call("cuStreamCreate", driver().CUstream_flags.CU_STREAM_NON_BLOCKING)


@contextmanager
def _short_sleeps() -> Iterator[None]:
    """Let threads wake when they ask for: Linux may add a slack of many microseconds."""
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
