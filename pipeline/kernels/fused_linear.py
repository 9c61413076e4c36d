"""What the fused linear kernels share on the host: matrices, a launch's operands, and the argument of two of them.

The host twin of csrc/gpu/fused_linear.cuh.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.dtypes import DType
from pipeline.errors import ShapeError
from pipeline.kernels.variant import Variant, alignment

_MAX_STRIDE_BYTES = 2**32 - 1


class Matrix(NamedTuple):
    """A row-major matrix in device memory: first address, size, and elements from one row to the next."""

    address: int
    rows: int
    columns: int
    stride: int


@dataclass(frozen=True)
class ExactRows:
    """Device addresses of a list of rows and of their number (both int32): those that are computed in exact fp32."""

    rows: int
    count: int


@dataclass(frozen=True)
class Operands:
    """What a launch reads and writes: y = epilogue(x w^T + bias).

    x and w are of `dtype`, y of `out_dtype`. `bias` is a device address, 0 for none; `epilogue` the parameters of the
    epilogue (`Epilogue.pack`). Of split operands x and w are the parts (fp16), and the scales' addresses are given.
    """

    x: Matrix
    w: Matrix
    bias: int
    y: Matrix
    dtype: DType
    out_dtype: DType
    epilogue: ctypes.Structure
    as_tf32: bool = False
    x_scales: int = 0
    w_scales: int = 0
    exact: ExactRows | None = None  # where only some rows are computed

    @property
    def load_bytes(self) -> int:
        """The widest access that divides addresses and row strides of x and w.

        The stride of a single row counts too, so that a row gets the same kernel alone and among others. Rows that
        repeat (stride 0) are nothing for tensor maps.
        """
        strides = (matrix.stride * self.dtype.itemsize or 4 for matrix in (self.x, self.w))
        return alignment(16, self.x.address, self.w.address, *strides)

    @property
    def store_bytes(self) -> int:
        """The same for y."""
        return alignment(16, self.y.address, self.y.stride * self.out_dtype.itemsize or 4)


@functools.cache
def argument_type(parameters: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """The one argument of the sm80 and SIMT kernels, for an epilogue with such parameters: FusedLinearArgs."""

    class FusedLinearArgs(ctypes.Structure):
        _fields_ = (
            ("x", ctypes.c_void_p),
            ("w", ctypes.c_void_p),
            ("bias", ctypes.c_void_p),
            ("y", ctypes.c_void_p),
            ("y_stride", ctypes.c_longlong),
            ("exact_rows", ctypes.c_void_p),
            ("exact_count", ctypes.c_void_p),
            ("x_scales", ctypes.c_void_p),
            ("w_scales", ctypes.c_void_p),
            ("x_stride_bytes", ctypes.c_uint),
            ("w_stride_bytes", ctypes.c_uint),
            ("rows", ctypes.c_int),
            ("in_features", ctypes.c_int),
            ("out_features", ctypes.c_int),
            ("epilogue", parameters),
        )

    return FusedLinearArgs


def pack(variant: Variant, operands: Operands) -> ctypes.Structure:
    """The argument of a launch of an sm80 or SIMT kernel.

    Raises:
        ShapeError: a stride beyond the kernels' index range.
    """
    x, w, y = operands.x, operands.w, operands.y
    strides = [matrix.stride * operands.dtype.itemsize if matrix.rows > 1 else 0 for matrix in (x, w)]
    for name, stride_bytes in zip("xw", strides, strict=True):
        check_range(f"row stride of {name}, bytes,", stride_bytes, _MAX_STRIDE_BYTES)
    exact = operands.exact or ExactRows(0, 0)
    return variant.argument(
        x=x.address,
        w=w.address,
        bias=operands.bias,
        y=y.address,
        y_stride=y.stride,
        x_stride_bytes=strides[0],
        w_stride_bytes=strides[1],
        rows=x.rows,
        in_features=x.columns,
        out_features=w.rows,
        exact_rows=exact.rows,
        exact_count=exact.count,
        x_scales=operands.x_scales,
        w_scales=operands.w_scales,
        epilogue=operands.epilogue,
    )


def check_range(what: str, value: int, largest: int) -> None:
    """Check a size or a stride.

    Raises:
        ShapeError: it is beyond the kernels' index range.
    """
    if not 0 <= value <= largest:
        raise ShapeError(f"{what} is {value}, kernels take 0 to {largest}; split the data or make it contiguous")
