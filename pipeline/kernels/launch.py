"""Launches the fused linear kernels: the host twin of `FusedLinearArgs`, loaded cubins and the driver calls.

Everything here is asynchronous: a launch returns once the driver has queued it. Memory belongs to the caller, who
keeps it alive until the stream has passed the launch.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.dtypes import DType
from pipeline.errors import DeviceNotFoundError, OptionError, ShapeError
from pipeline.kernels.choose import Problem, Variant, alignment, architecture, select
from pipeline.kernels.compile import compile_variant
from pipeline.kernels.driver import call, call_error, check_not_forked, driver
from pipeline.kernels.tensor_map import TensorMap, tensor_map

_MAX_STRIDE_BYTES = 2**32 - 1
_MAX_ROW_BYTES = 2**31 - 2**12
_MAX_ROWS = 2**31 - 2**12
_MAX_BLOCKS = 2**31 - 1
_Y_BOX_ROWS = 16  # a warp's rows (csrc/gpu/fused_linear_sm90.cuh)


class FusedLinearArgs(ctypes.Structure):
    """The one argument of the sm80 and SIMT kernels; the same fields as in csrc/gpu/fused_linear.cuh."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_longlong),
        ("x_stride_bytes", ctypes.c_uint),
        ("w_stride_bytes", ctypes.c_uint),
        ("rows", ctypes.c_int),
        ("in_features", ctypes.c_int),
        ("out_features", ctypes.c_int),
        ("scaling_factor", ctypes.c_float),
        ("row_list", ctypes.c_void_p),
        ("row_count", ctypes.c_void_p),
        ("x_scales", ctypes.c_void_p),
        ("w_scales", ctypes.c_void_p),
    )


class FusedLinearSm90Args(ctypes.Structure):
    """The one argument of the Hopper kernels; the same fields as in csrc/gpu/fused_linear_sm90.cuh."""

    _fields_ = (
        ("x", TensorMap),
        ("w", TensorMap),
        ("y", TensorMap),
        ("bias", ctypes.c_void_p),
        ("y_data", ctypes.c_void_p),
        ("y_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("in_features", ctypes.c_int),
        ("out_features", ctypes.c_int),
        ("band_rows", ctypes.c_int),
        ("x_box_rows", ctypes.c_int),
        ("scaling_factor", ctypes.c_float),
        ("x_scales", ctypes.c_void_p),
        ("w_scales", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class TmaOperand:
    """A row-major matrix in device memory as the copy engine reads it; address and stride are multiples of 16 bytes."""

    address: int
    dtype: DType
    rows: int
    columns: int
    stride_bytes: int
    as_tf32: bool = False


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
        self._lock = threading.Lock()
        self.plan = functools.lru_cache(maxsize=1024)(self._make_plan)
        self.prepare_launch = functools.lru_cache(maxsize=4096)(self._prepare_launch)

    def prepare(self, problem: Problem, rows: int, x_stride: int | None = None, w_stride: int | None = None) -> str:
        """Compiles and loads now what `launch` would need for 16-byte aligned addresses; blocks about a second.

        Strides are in elements; None means contiguous rows. Returns the kernel's description, for reports.

        Raises:
            CompileError: with the compiler's log.
            DTypeError, OptionError: no kernel for the problem.
        """
        itemsize = problem.in_dtype.itemsize
        strides = (problem.in_features if stride is None else stride for stride in (x_stride, w_stride))
        load_bytes = alignment(16, *(stride * itemsize for stride in strides))
        store_bytes = alignment(16, problem.out_features * problem.out_dtype.itemsize)
        kernel, _ = self.plan(problem, max(rows, 1), load_bytes, store_bytes)
        return kernel.variant.description

    def launch(
        self,
        stream: int,
        problem: Problem,
        *,
        rows: int,
        x: int,
        x_stride: int,
        w: int,
        w_stride: int,
        bias: int,
        y: int,
        y_stride: int,
        scaling_factor: float,
        variant: Variant | None = None,
    ) -> None:
        """Queues y = epilogue(x w^T + bias) on `stream` (a raw CUstream) and returns without waiting for it.

        Pointers are device addresses, strides count elements, `bias` 0 means none; the bias is of the data's type.
        x, w and y must not overlap. Nothing is queued for 0 rows or 0 output features. `variant` overrides the
        selection, for tests and benchmarks: one of `candidates` for these operands.

        Raises:
            ShapeError: a size or stride beyond the kernels' index range.
            DriverError: the launch failed.
        """
        layout = (x, x_stride, w, w_stride, bias, y, y_stride)
        prepared = self.prepare_launch(problem, rows, *layout, scaling_factor, variant)
        if prepared is not None:
            prepared.queue(stream)

    def load(self, variant: Variant) -> LoadedKernel:
        """`variant` on this device, compiled and loaded at the first call.

        Raises:
            CompileError: with the compiler's log.
            DriverError: the driver refused the code.
        """
        with self._lock:
            if variant not in self._kernels:
                compiled = compile_variant(variant, self.arch)
                with in_context(self.context):
                    module = call("cuModuleLoadData", compiled.cubin)
                    function = call("cuModuleGetFunction", module, variant.kernel.encode())
                    attribute = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    call("cuFuncSetAttribute", function, attribute, variant.shared_bytes)
                self._kernels[variant] = LoadedKernel(variant, function, compiled.report.registers)
            return self._kernels[variant]

    def _make_plan(
        self, problem: Problem, rows: int, load_bytes: int, store_bytes: int, variant: Variant | None = None
    ) -> tuple[LoadedKernel, int]:
        """The kernel and the grid for a launch; `launch` remembers the last thousand."""
        _check_range("rows", rows, _MAX_ROWS)
        _check_range("in_features, bytes,", problem.in_features * problem.in_dtype.itemsize, _MAX_ROW_BYTES)
        _check_range("out_features", problem.out_features, _MAX_ROWS)
        variant = variant or select(
            self.arch, problem, rows, load_bytes, store_bytes, multiprocessors=self.multiprocessors
        )
        _check_range("tiles of the output", variant.tiles(rows, problem.out_features), _MAX_BLOCKS)
        return self.load(variant), variant.blocks(rows, problem.out_features, self.multiprocessors)

    def _prepare_launch(
        self,
        problem: Problem,
        rows: int,
        x: int,
        x_stride: int,
        w: int,
        w_stride: int,
        bias: int,
        y: int,
        y_stride: int,
        scaling_factor: float,
        variant: Variant | None = None,
    ) -> PreparedLaunch | None:
        """What `launch` queues with the same arguments, or None for no outputs; remembers the last few thousand."""
        if rows == 0 or problem.out_features == 0:
            return None
        itemsize, out_itemsize = problem.in_dtype.itemsize, problem.out_dtype.itemsize
        x_stride_bytes, w_stride_bytes = x_stride * itemsize, w_stride * itemsize
        # The stride of a single row counts too, so that a row gets the same kernel alone and among others. Rows that
        # repeat (stride 0) are nothing for tensor maps.
        load_bytes = alignment(16, x, w, x_stride_bytes or 4, w_stride_bytes or 4)
        store_bytes = alignment(16, y, y_stride * out_itemsize or 4)
        kernel, blocks = self.plan(problem, rows, load_bytes, store_bytes, variant)
        sizes = (rows, problem.in_features, problem.out_features)
        if not kernel.variant.persistent:
            return self.prepare_rows(
                kernel, blocks, x, x_stride_bytes, w, w_stride_bytes, bias, y, y_stride, *sizes, scaling_factor
            )

        if kernel.variant.kernel != "fused_linear_sm90":
            raise OptionError(f"{kernel.variant.description} needs split operands: see pipeline/kernels/split.py")
        tf32 = problem.precision == "tf32"
        x_operand = TmaOperand(x, problem.in_dtype, rows, problem.in_features, x_stride_bytes, tf32)
        w_operand = TmaOperand(w, problem.in_dtype, problem.out_features, problem.in_features, w_stride_bytes, tf32)
        return self.prepare_tma(
            kernel, blocks, x_operand, w_operand, bias, y, y_stride, problem.out_dtype, store_bytes, scaling_factor
        )

    def prepare_rows(
        self,
        kernel: LoadedKernel,
        blocks: int,
        x: int,
        x_stride_bytes: int,
        w: int,
        w_stride_bytes: int,
        bias: int,
        y: int,
        y_stride: int,
        rows: int,
        in_features: int,
        out_features: int,
        scaling_factor: float,
        **more: int,
    ) -> PreparedLaunch:
        """The launch of an sm80 or SIMT kernel. `y_stride` counts elements; `more` are the last fields of the argument.

        Raises:
            ShapeError: a stride beyond the kernels' index range.
        """
        x_stride_bytes = x_stride_bytes if rows > 1 else 0
        w_stride_bytes = w_stride_bytes if out_features > 1 else 0
        _check_range("row stride of x, bytes,", x_stride_bytes, _MAX_STRIDE_BYTES)
        _check_range("row stride of w, bytes,", w_stride_bytes, _MAX_STRIDE_BYTES)
        sizes = (rows, in_features, out_features)
        strides = (y_stride, x_stride_bytes, w_stride_bytes)
        args = FusedLinearArgs(x, w, bias, y, *strides, *sizes, scaling_factor, **more)
        return PreparedLaunch(kernel, self.context, blocks, args)

    def prepare_tma(
        self,
        kernel: LoadedKernel,
        blocks: int,
        x: TmaOperand,
        w: TmaOperand,
        bias: int,
        y: int,
        y_stride: int,
        out_dtype: DType,
        store_bytes: int,
        scaling_factor: float,
        x_scales: int = 0,
        w_scales: int = 0,
    ) -> PreparedLaunch:
        """The launch of a Hopper kernel. `y_stride` counts elements; scales are device addresses, 0 for none."""
        tile = kernel.variant
        x_box_rows = min(tile.block_m, x.rows)  # rows that x doesn't have need not arrive: their outputs aren't stored
        y_map = TensorMap()
        with in_context(self.context):
            x_map = tensor_map(x.address, x.dtype, x.rows, x.columns, x.stride_bytes, x_box_rows, x.as_tf32)
            w_map = tensor_map(w.address, w.dtype, w.rows, w.columns, w.stride_bytes, tile.block_n, w.as_tf32)
            if store_bytes == 16:
                y_map = tensor_map(y, out_dtype, x.rows, w.rows, y_stride * out_dtype.itemsize, _Y_BOX_ROWS)
        sizes = (x.rows, x.columns, w.rows, tile.band_rows, x_box_rows)
        args = FusedLinearSm90Args(x_map, w_map, y_map, bias, y, y_stride, *sizes, scaling_factor, x_scales, w_scales)
        return PreparedLaunch(kernel, self.context, blocks, args)


def _check_range(what: str, value: int, largest: int) -> None:
    if not 0 <= value <= largest:
        raise ShapeError(f"{what} is {value}, kernels take 0 to {largest}; split the data or make it contiguous")
