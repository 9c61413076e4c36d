"""Tensor maps: how the bulk tensor copy engine (TMA) is told about a matrix in device memory."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from pipeline.dtypes import DType
from pipeline.errors import ShapeError
from pipeline.kernels.driver import call_error, driver
from pipeline.kernels.fused_linear import Matrix

BOX_BYTES = 128  # a box's width: the span of the swizzle
TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64  # bytes
_MAX_STRIDE_BYTES = 2**40 - 16


class TensorMap(ctypes.Structure):
    """An encoded map, opaque; the same bytes as in csrc/gpu/ptx_sm90.cuh."""

    _fields_ = (("opaque", ctypes.c_uint64 * (TENSOR_MAP_BYTES // 8)),)


@functools.cache
def _encoder() -> Any:
    driver()  # initialises it
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    # NOTE: bound by hand because the bindings encode into an object at a multiple of 16 bytes; the driver wants 64.
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),  # map, element type, rank, address
        *(ctypes.c_void_p,) * 4,  # sizes, strides, box, steps
        *(ctypes.c_int,) * 4,  # interleave, swizzle, promotion, fill
    )
    function.restype = ctypes.c_int
    return function


@functools.lru_cache(maxsize=4096)
def tensor_map(matrix: Matrix, dtype: DType, box_rows: int, as_tf32: bool = False) -> TensorMap:
    """The map of a row-major matrix for boxes of `box_rows` rows x 128 bytes, 128-byte swizzle.

    Its address and its stride in bytes are multiples of 16. Boxes reach past the matrix: zeros are read there and
    nothing is written. `as_tf32` rounds fp32 to tf32 on the way in. Results are cached: don't change them.

    Raises:
        ShapeError: a stride beyond what a map holds.
        DriverError: the driver refused the map.
    """
    address, rows, columns, stride = matrix
    stride_bytes = stride * dtype.itemsize
    if stride_bytes > _MAX_STRIDE_BYTES:
        raise ShapeError(f"row stride is {stride_bytes} bytes, tensor maps hold {_MAX_STRIDE_BYTES}; copy the data")
    enums = driver()
    kind = "TFLOAT32" if as_tf32 else dtype.tensor_map_name
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    aligned = -(-ctypes.addressof(memory) // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
    code = _encoder()(
        aligned,
        int(getattr(enums.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}")),
        2,
        address,
        ctypes.byref((ctypes.c_uint64 * 2)(columns, rows)),
        ctypes.byref((ctypes.c_uint64 * 1)(stride_bytes)),
        ctypes.byref((ctypes.c_uint32 * 2)(BOX_BYTES // dtype.itemsize, box_rows)),
        ctypes.byref((ctypes.c_uint32 * 2)(1, 1)),
        int(enums.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(enums.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
        int(enums.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B),
        int(enums.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )
    if code != 0:
        what = f"cuTensorMapEncodeTiled(address {address:#x}, {rows} x {columns} {dtype}, stride {stride_bytes} bytes)"
        raise call_error(what, enums.CUresult(code))
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, TENSOR_MAP_BYTES))
