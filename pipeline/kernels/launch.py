"""Loaded kernels and their launches on one device.

Everything here is asynchronous: a launch returns once the driver has queued it. Memory belongs to the caller, who
keeps it alive until the stream has passed the launch.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.errors import DeviceNotFoundError
from pipeline.kernels.choose import select
from pipeline.kernels.compile import compile_variant
from pipeline.kernels.driver import call, call_error, check_not_forked, driver
from pipeline.kernels.fused_linear import Operands, check_range
from pipeline.kernels.variant import Problem, Variant, architecture

_MAX_ROW_BYTES = 2**31 - 2**12
_MAX_ROWS = 2**31 - 2**12
_MAX_BLOCKS = 2**31 - 1


@dataclass(frozen=True)
class LoadedKernel:
    """A variant's entry on one device."""

    variant: Variant
    function: Any  # CUfunction
    registers: int


class PreparedLaunch:
    """A launch but for its stream, for repeated use. Read-only, so threads share it: the driver copies the argument.

    It holds addresses, not memory: whoever keeps it sees to it that they are still right.
    """

    def __init__(self, kernel: LoadedKernel, context: Any, blocks: int, args: ctypes.Structure) -> None:
        variant = kernel.variant
        self.args = args
        self._context = context
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        self._call = driver().cuLaunchKernel
        sizes = (blocks, 1, 1, variant.threads, 1, 1, variant.shared_bytes)
        self._before_stream = (kernel.function, *sizes)
        self._after_stream = (ctypes.addressof(self._parameters), 0)

    def queue(self, stream: int) -> None:
        """Queue the kernel on `stream` (a raw CUstream) and return without waiting for it.

        Raises:
            DriverError: the launch failed.
        """
        with in_context(self._context):
            (code,) = self._call(*self._before_stream, stream, *self._after_stream)
        if code != 0:
            raise call_error("cuLaunchKernel", code)


@contextmanager
def in_context(context: Any) -> Iterator[None]:
    """`context` current in the calling thread; whatever was current comes back at the end."""
    if int(call("cuCtxGetCurrent")) == int(context):
        yield
        return
    call("cuCtxPushCurrent", context)
    try:
        yield
    finally:
        call("cuCtxPopCurrent")


class Launcher:
    """Compiles, loads and launches kernels on one device. One per device and process; all methods are thread-safe."""

    arch: str
    name: str
    multiprocessors: int

    _launchers: ClassVar[dict[int, Launcher]] = {}
    _launchers_lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def for_device(cls, ordinal: int) -> Launcher:
        """The launcher of CUDA device `ordinal`. Which GPU is current in the calling thread doesn't change.

        Raises:
            DeviceNotFoundError: no driver, or no such device.
            DeviceError: a GPU the kernels don't run on, or a process forked after CUDA had started.
        """
        check_not_forked()
        with cls._launchers_lock:
            if ordinal not in cls._launchers:
                cls._launchers[ordinal] = cls(ordinal)
            return cls._launchers[ordinal]

    def __init__(self, ordinal: int) -> None:
        device_count = call("cuDeviceGetCount")
        if not 0 <= ordinal < device_count:
            raise DeviceNotFoundError(
                f"device is cuda:{ordinal}, this machine shows {device_count} (see CUDA_VISIBLE_DEVICES and nvidia-smi)"
            )
        device = call("cuDeviceGet", ordinal)
        attributes = driver().CUdevice_attribute
        major = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.name = call("cuDeviceGetName", 256, device).split(b"\0")[0].decode()
        self.arch = architecture(major, minor, self.name)
        self.multiprocessors = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)
        self.context = call("cuDevicePrimaryCtxRetain", device)
        self._kernels: dict[Variant, LoadedKernel] = {}
        self._turns: dict[Variant, threading.Lock] = {}  # who loads a variant; the others wait
        self._lock = threading.Lock()
        self.choose = functools.lru_cache(maxsize=1024)(self._choose)

    def memory_bytes(self) -> tuple[int, int]:
        """Free memory of the device and all of it."""
        with in_context(self.context):
            free, total = call("cuMemGetInfo")
        return int(free), int(total)

    def load(self, variant: Variant) -> LoadedKernel:
        """`variant` on this device, compiled and loaded at the first call.

        Raises:
            CompileError: with the compiler's log.
            DriverError: the driver refused the code.
        """
        with self._lock:
            turn = self._turns.setdefault(variant, threading.Lock())
        with turn:
            if variant not in self._kernels:
                self._kernels[variant] = self._load(variant)
            return self._kernels[variant]

    def load_all(self, variants: Sequence[Variant]) -> list[LoadedKernel]:
        """The same for several, which are compiled at the same time."""
        errors: list[BaseException] = []

        def load(variant: Variant) -> None:
            try:
                self.load(variant)
            except BaseException as error:  # raised in the calling thread
                errors.append(error)

        missing = [variant for variant in variants[1:] if variant not in self._kernels]
        threads = [threading.Thread(target=load, args=(variant,), name="pipeline-compile") for variant in missing]
        for thread in threads:
            thread.start()
        load(variants[0])
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [self.load(variant) for variant in variants]

    def _load(self, variant: Variant) -> LoadedKernel:
        compiled = compile_variant(variant, self.arch)
        with in_context(self.context):
            module = call("cuModuleLoadData", compiled.cubin)
            function = call("cuModuleGetFunction", module, variant.kernel.encode())
            attribute = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", function, attribute, variant.shared_bytes)
        return LoadedKernel(variant, function, compiled.report.registers)

    def _choose(
        self, problem: Problem, rows: int, load_bytes: int, store_bytes: int, variant: Variant | None = None
    ) -> LoadedKernel:
        """The kernel for so many rows, or `variant`'s. `choose` is this, and remembers the last thousand.

        Raises:
            ShapeError: a size beyond the kernels' index range.
        """
        return self.load(self.select(problem, rows, load_bytes, store_bytes, variant))

    def select(
        self, problem: Problem, rows: int, load_bytes: int, store_bytes: int, variant: Variant | None = None
    ) -> Variant:
        """What `choose` chooses, not loaded.

        Raises:
            ShapeError: a size beyond the kernels' index range.
        """
        check_range("rows", rows, _MAX_ROWS)
        check_range("in_features, bytes,", problem.in_features * problem.in_dtype.itemsize, _MAX_ROW_BYTES)
        check_range("out_features", problem.out_features, _MAX_ROWS)
        variant = variant or select(
            self.arch, problem, rows, load_bytes, store_bytes, multiprocessors=self.multiprocessors
        )
        check_range("tiles of the output", variant.tiles(rows, problem.out_features), _MAX_BLOCKS)
        return variant

    def prepare(self, kernel: LoadedKernel, operands: Operands) -> PreparedLaunch:
        """The launch of a fused linear kernel.

        Raises:
            ShapeError: a stride beyond the kernel's range.
        """
        variant = kernel.variant
        assert variant.pack is not None
        blocks = variant.blocks(operands.x.rows, operands.w.rows, self.multiprocessors)
        with in_context(self.context):
            args = variant.pack(variant, operands)
        return PreparedLaunch(kernel, self.context, blocks, args)
