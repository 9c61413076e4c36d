"""The protocol between the executor and a device.

A device holds a layer's weights, a compiled kernel and `num_streams` chunk buffers, called slots. Operations on one
slot happen in the order in which they were queued; operations on different slots overlap as the hardware allows.
Every queued operation returns at once with an `Operation` that says when it is done.

Who may call what: while chunks run, the executor's thread alone queues kernels and, for pieces that Python moves,
copies. Where C moves pieces (`native_copies`), its thread queues their copies on the device's two copy streams, and
nobody else uses those meanwhile. All other methods are for one thread at a time, before and after.
"""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from pipeline.arrays import HostArray, address_of
from pipeline.dtypes import DType
from pipeline.errors import OptionError
from pipeline.layer.base import DeviceLayer, Layer, Place
from pipeline.rows import HOST, DeviceRows, Operation, Workers


@dataclass(frozen=True)
class NativeCopies:
    """What code in C needs to copy between pinned memory and a device's slots (csrc/host/mover.c).

    `functions` are the addresses of the CUDA driver's cuCtxSetCurrent, cuMemcpyHtoDAsync, cuMemcpyDtoHAsync,
    cuEventRecord and cuEventQuery; then there are handles of a context and of streams. `new_event` makes an event that
    lives until the device is closed, `input` and `output` give the addresses of a slot's buffers, whose rows follow one
    another. `before_kernel` lets a slot's next kernel wait for an event, `after_kernel` gives the event of its last,
    valid until the slot's next. `error` is the exception for an operation that ended with a CUresult.
    """

    functions: tuple[int, ...]
    context: int
    in_stream: int
    out_stream: int
    new_event: Callable[[], int]
    input: Callable[[int], int]
    output: Callable[[int], int]
    before_kernel: Callable[[int, int], None]
    after_kernel: Callable[[int], int]
    error: Callable[[str, int], Exception]


class Uploader(Protocol):
    """Brings large arrays to a device faster than its own copies of ordinary memory do."""

    def touch(self, memory: HostArray) -> None:
        """Have the system make the pages of new memory (uint8), which begins with a huge page."""

    def upload(self, rows: HostArray, copy: Callable[[int, HostArray], Callable[[], None]]) -> bool:
        """Copy contiguous `rows` block by block. False, and nothing was copied, where that wouldn't be faster.

        `copy` queues the copy of a block, pinned memory that begins with the row of that number, and gives what waits
        for it. All copies are queued when this returns; the block's memory may be used again when all have ended.
        """


class Device(ABC):
    """One place where chunks are computed. See the module's docstring for the rules of ordering."""

    name: str  # "cuda:0", "cpu", "sim"
    description: str  # the hardware, for reports
    kernel: str = ""  # what computes, for reports; set by prepare()
    runs_as: str = ""  # the precision that really runs; set by prepare()
    poison: bool = False  # overwrite pinned pieces between uses
    host_clock: bool = True  # its clock is the host's, time.perf_counter
    allocated_bytes: int = 0  # memory of its own that it holds, apart from the host's; set by allocate()
    uploader: Uploader | None = None  # for the layer's weights; set before prepare(), where somebody offers it
    has_bus: bool = False  # its memory is apart from the host's, and `for_copies` gives what measures the way between

    def now(self) -> float:
        """Seconds on the clock of this device's operations."""
        return time.perf_counter()

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Device memory that could still be allocated, or None where that isn't limited."""

    @abstractmethod
    def prepare(self, layer: Layer, out_dtype: DType, chunk_rows: int) -> None:
        """Bring the layer here (`Layer.on`): compile or find its kernel and upload the weights. Blocks.

        Raises:
            OptionError: the layer can't be computed here.
            CompileError, DeviceMemoryError, DriverError
        """

    def exact_rows(self) -> int:
        """Rows computed so far in exact fp32 because the fp32-accurate kernel's pairs couldn't hold them."""
        return 0

    @abstractmethod
    def allocate(self, chunk_rows: int, num_streams: int) -> None:
        """Make `num_streams` slots, each with room for `chunk_rows` rows in and out, for the prepared layer."""

    @abstractmethod
    def pinned(self, n_bytes: int) -> HostArray:
        """Host memory that `upload` and `download` can use (uint8, 64-byte aligned). Lives until `close`."""

    def free_pinned(self, memory: HostArray) -> None:
        """Free what `pinned` gave before `close` does. Nothing may be using it any more."""

    @abstractmethod
    def in_place(self, rows: HostArray) -> bool:
        """Whether `upload` and `download` can use this contiguous host memory of the caller's as it is."""

    def own_rows(self, rows: HostArray) -> DeviceRows | None:
        """Contiguous host rows of the caller's as rows of the device, where its kernels can use them as they are."""
        return None

    @abstractmethod
    def upload(self, slot: int, first: int, rows: HostArray) -> Operation:
        """Queue a copy of contiguous host rows into the slot's input buffer, starting at row `first` of the chunk."""

    @abstractmethod
    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        """Queue one kernel on the slot's first `rows` rows, reading `source` and writing `target` instead of the
        slot's own buffers where given. `dataset_row` is the number of the first row in its dataset."""

    @abstractmethod
    def download(self, slot: int, first: int, rows: HostArray) -> Operation:
        """Queue a copy from the slot's output buffer, starting at row `first` of the chunk, to contiguous host rows."""

    def native_copies(self) -> NativeCopies | None:
        """What C copies to and from the allocated slots with, or None where only `upload` and `download` can."""
        return None

    def order_after(self, tensor: Any) -> None:
        """Let all later operations wait for what the caller has queued on the tensor's stream so far."""

    def for_copies(self, row_bytes: int, chunk_rows: int, num_streams: int) -> Device:
        """A second device on the same hardware whose kernels do nothing, for measuring copies: slots are allocated, for
        rows of `row_bytes` in and out. The caller closes it. Only where `has_bus`.

        Raises:
            DeviceMemoryError: the slots don't fit beside what is there.
        """
        raise NotImplementedError(f"{self.name} has no bus to measure")

    def workers(self) -> Workers | None:
        """Copy workers of the device's own, for devices with a clock of their own."""
        return None

    def running(self) -> AbstractContextManager[None]:
        """What holds in the thread that uploads, computes and downloads, while it does."""
        return nullcontext()

    @abstractmethod
    def idle(self) -> None:
        """Called by the executor when nothing could be moved: give way for a moment."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything queued is done."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Safe to call twice."""


def aligned_memory(n_bytes: int) -> HostArray:
    """Ordinary host memory with the alignment that `Device.pinned` promises."""
    memory = np.empty(n_bytes + 63, np.uint8)
    start = -address_of(memory) % 64
    return memory[start : start + n_bytes]


class HostPlace(Place):
    """Ordinary memory as the place of a layer."""

    kind: ClassVar[str] = "host"

    def __init__(self) -> None:
        self._arrays: list[HostArray] = []

    def allocate(self, n_bytes: int, what: str) -> int:
        memory = np.empty(n_bytes + 255, np.uint8)
        self._arrays.append(memory)
        return -(-address_of(memory) // 256) * 256

    def upload(self, array: HostArray, what: str) -> int:
        """Its own address: nothing is copied."""
        self._arrays.append(array)
        return address_of(array)

    def upload_rows(self, rows: HostArray, what: str) -> DeviceRows:
        """The rows themselves: nothing is copied."""
        return host_rows(rows)

    def read(self, address: int, n_bytes: int) -> bytes:
        return ctypes.string_at(address, n_bytes)


def layer_at(place: Place, layer: Layer, out_dtype: DType, chunk_rows: int) -> DeviceLayer:
    """The layer at a place: see `Layer.on`.

    Raises:
        OptionError: what the layer returned isn't one.
    """
    found: object = layer.on(place, out_dtype, chunk_rows)
    if not isinstance(found, DeviceLayer):
        raise OptionError(
            f"{type(layer).__name__}.on returned a {type(found).__name__}, expected a DeviceLayer; return one"
        )
    return found


class NoLayer(DeviceLayer):
    """The layer of a device that was given none: its kernels do nothing."""

    kernel, runs_as = "", ""

    def queue(self, x: DeviceRows, y: DeviceRows, first_row: int, stream: int, scratch: int) -> None:
        pass


def host_rows(rows: HostArray) -> DeviceRows:
    """Host rows, each of them contiguous, for a layer on the host."""
    stride = rows.strides[0] // rows.itemsize if len(rows) > 1 else rows.shape[1]  # a single row may have any
    return DeviceRows(HOST, address_of(rows), stride, len(rows), rows)
