"""A GPU's memory: what a device allocates, rows as they lie in it, and pinned memory of the host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.arrays import HostArray, address_of
from pipeline.config import GIB
from pipeline.devices.base import Uploader
from pipeline.errors import DeviceMemoryError
from pipeline.kernels.driver import call, call_error, driver
from pipeline.kernels.launch import Launcher, in_context
from pipeline.layer.base import ALIGNMENT_BYTES, Place
from pipeline.pages import Pages
from pipeline.rows import DeviceRows


class CudaMemory:
    """Device memory and pinned host memory, all of it freed together. The GPU is current in the calling thread."""

    def __init__(self, device_name: str) -> None:
        self._device_name = device_name
        self._device: dict[int, int] = {}  # bytes by address
        self._pinned: dict[int, HostArray] = {}  # by address

    def free_bytes(self) -> int:
        return int(call("cuMemGetInfo")[0])

    @property
    def allocated_bytes(self) -> int:
        """Of the device."""
        return sum(self._device.values())

    def allocate(self, n_bytes: int, what: str) -> int:
        """The address of new device memory.

        Raises:
            DeviceMemoryError: it doesn't fit; `what` is what the message calls it.
        """
        try:
            address = int(call("cuMemAlloc", max(1, n_bytes)))
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{what} needs {n_bytes / GIB:.2f} GiB on {self._device_name}, {self.free_bytes() / GIB:.2f} GiB are "
                f"free; use smaller chunk_rows or num_streams, or free memory on the GPU"
            ) from error
        self._device[address] = n_bytes
        return address

    def pinned(self, n_bytes: int, touch: Callable[[HostArray], None]) -> HostArray:
        """New host memory for copies. Pinning pages that are there is several times faster than having the driver
        allocate them, the more so where `touch` has them made by several threads (docs/notes/start.md)."""
        memory = Pages.new(max(1, n_bytes)).memory
        touch(memory)
        call("cuMemHostRegister", address_of(memory), memory.nbytes, driver().CU_MEMHOSTREGISTER_PORTABLE)
        self._pinned[address_of(memory)] = memory
        return memory[:n_bytes]

    def free_pinned(self, memory: HostArray) -> None:
        address = address_of(memory)
        self._pinned.pop(address)
        call("cuMemHostUnregister", address)

    def close(self) -> None:
        for address in self._device:
            driver().cuMemFree(address)
        for address in self._pinned:
            driver().cuMemHostUnregister(address)
        self._device.clear()
        self._pinned.clear()


@dataclass(frozen=True)
class PitchedRows:
    """How rows of `row_bytes` lie in device memory: `pitch_bytes` from one to the next."""

    row_bytes: int
    pitch_bytes: int

    @classmethod
    def aligned(cls, row_bytes: int) -> PitchedRows:
        """As the fastest kernel reads them."""
        return cls(row_bytes, -(-row_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)

    @property
    def packed(self) -> bool:
        """Whether each row follows the one before."""
        return self.pitch_bytes == self.row_bytes

    def copy_in(self, target: int, rows: HostArray, stream: Any) -> None:
        """Queue a copy of contiguous host rows."""
        source = address_of(rows)
        if self.packed:
            call("cuMemcpyHtoDAsync", target, source, rows.nbytes, stream)
            return
        copy = driver().CUDA_MEMCPY2D()
        copy.srcMemoryType = driver().CUmemorytype.CU_MEMORYTYPE_HOST
        copy.srcHost, copy.srcPitch = source, self.row_bytes
        self._copy(copy, target, rows.nbytes // self.row_bytes, stream)

    def copy_on_device(self, target: int, source: int, source_pitch_bytes: int, rows: int, stream: Any) -> None:
        """Queue a copy of rows that lie in device memory in another way."""
        copy = driver().CUDA_MEMCPY2D()
        copy.srcMemoryType = driver().CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = source, source_pitch_bytes
        self._copy(copy, target, rows, stream)

    def _copy(self, copy: Any, target: int, rows: int, stream: Any) -> None:
        copy.dstMemoryType = driver().CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.dstDevice, copy.dstPitch = target, self.pitch_bytes
        copy.WidthInBytes, copy.Height = self.row_bytes, rows
        call("cuMemcpy2DAsync", copy, stream)


class CudaPlace(Place):
    """A GPU as the place of a layer. It is current in the calling thread."""

    kind = "cuda"

    def __init__(self, ordinal: int, memory: CudaMemory, stream: Any, uploader: Uploader | None = None) -> None:
        self.ordinal, self.stream, self._memory, self._stream = ordinal, int(stream), memory, stream
        self._uploader = uploader

    def allocate(self, n_bytes: int, what: str) -> int:
        return self._memory.allocate(n_bytes, what)

    def upload(self, array: HostArray, what: str) -> int:
        address = self.allocate(array.nbytes, what)
        call("cuMemcpyHtoDAsync", address, address_of(array), array.nbytes, self._stream)
        call("cuStreamSynchronize", self._stream)
        return address

    def upload_rows(self, rows: HostArray, what: str) -> DeviceRows:
        layout = PitchedRows.aligned(rows.shape[1] * rows.itemsize)
        address = self.allocate(len(rows) * layout.pitch_bytes, what)

        def copy(first: int, block: HostArray) -> Callable[[], None]:
            layout.copy_in(address + first * layout.pitch_bytes, block, self._stream)
            return self._recorded()

        if self._uploader is None or not self._uploader.upload(rows, copy):
            layout.copy_in(address, rows, self._stream)
        call("cuStreamSynchronize", self._stream)
        return DeviceRows(self.ordinal, address, layout.pitch_bytes // rows.itemsize, len(rows), self._memory)

    def _recorded(self) -> Callable[[], None]:
        """What waits for all that is queued so far. To be called once."""
        event = call("cuEventCreate", driver().CUevent_flags.CU_EVENT_DISABLE_TIMING)
        call("cuEventRecord", event, self._stream)

        def wait() -> None:
            call("cuEventSynchronize", event)
            call("cuEventDestroy", event)

        return wait

    def read(self, address: int, n_bytes: int) -> bytes:
        host = ctypes.create_string_buffer(n_bytes)
        call("cuMemcpyDtoH", ctypes.addressof(host), address, n_bytes)
        return host.raw


# -- pinned memory of the host -----------------------------------------------------------------------------------------


def is_pinned(address: int) -> bool:
    """Whether the host memory at `address` is pinned, as the driver knows it."""
    with in_context(Launcher.for_device(0).context):
        return is_pinned_here(address)


def is_pinned_here(address: int) -> bool:
    """The same, where a GPU is current in the calling thread."""
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
