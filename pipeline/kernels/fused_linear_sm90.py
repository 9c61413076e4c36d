"""The host twin of csrc/gpu/fused_linear_sm90.cuh: Hopper's tensor cores fed by the bulk tensor copy engine.

Operands as they are (bf16, fp16, tf32), or fp32 split into fp16 pairs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.kernels.fused_linear import Operands
from pipeline.kernels.tensor_map import TENSOR_MAP_ALIGNMENT, TensorMap, tensor_map
from pipeline.kernels.variant import (
    FINE_SUMS_UP_TO,
    ROW_BYTES,
    SHARED_BYTES,
    Problem,
    Variant,
    described,
)

_Y_BOX_ROWS = 16  # a warp's rows
_STORE_BUFFER_BYTES = 8 * 16 * ROW_BYTES  # 16 rows for each of the consumers' eight warps
_BAND_ROWS = 2048  # rows of x that pass through L2 together: as many as columns of y in a wave of 132 tiles
_STORE_COST = 0.16  # Variant.store_cost; measured: docs/notes/kernels.md


@dataclass(frozen=True)
class _Tile:
    """A tile of y. `rate` is its speed inside of a tile against the best tile's."""

    block_m: int
    block_n: int
    stages: int
    rate: float
    any_store: bool = False  # also instantiated for outputs that TMA can't write


# Where the rates come from: docs/notes/kernels.md. In what they differ most, how evenly their tiles divide among the
# multiprocessors, `Variant.cost` counts: 8192 columns are 48.8 tiles of 168. That of 64 x 64 is low on purpose, so that
# few outputs get it.
_TILES = (
    _Tile(128, 192, 5, 1.0),
    _Tile(128, 168, 5, 0.985),
    _Tile(128, 160, 5, 0.97),
    _Tile(128, 144, 6, 0.957),
    _Tile(128, 128, 6, 0.945, any_store=True),
    _Tile(64, 128, 8, 0.83),
    _Tile(64, 64, 12, 0.4, any_store=True),
)
# Two consumers side by side, each with 64 rows and two and a half sets of accumulators.
_SPLIT_TILES = (
    _Tile(128, 168, 5, 1.0),
    _Tile(128, 128, 6, 0.963, any_store=True),
    _Tile(128, 64, 8, 0.86),
)


def variants(problem: Problem, store_bytes: int) -> Iterator[Variant]:
    """Those that can store, fastest tile first."""
    for tile in _SPLIT_TILES if problem.precision == "fp32" else _TILES:
        if tile.any_store or store_bytes == 16:
            yield _variant(problem, tile, tma_store=store_bytes == 16)


def _variant(problem: Problem, tile: _Tile, tma_store: bool) -> Variant:
    if problem.precision == "fp32":
        promote_every = 1 if problem.in_features <= FINE_SUMS_UP_TO else 2
        kernel, operands, epilogue = "fused_linear_split_sm90", f"SplitFp16<{promote_every}>", "Exact"
        sums = f", sums of {32 * promote_every}"
    else:
        kernel, operands, epilogue = "fused_linear_sm90", f"Plain<{problem.in_dtype.cuda_name}>", "Fast"
        sums = ""
    numbers = f"{tile.block_m}, {tile.block_n}, {tile.stages}, {'true' if tma_store else 'false'}"
    block_k = ROW_BYTES // problem.in_dtype.itemsize
    ring_bytes = tile.stages * ((tile.block_m + tile.block_n) * ROW_BYTES + 16) + 16
    two_fit = ring_bytes + 2 * _STORE_BUFFER_BYTES <= SHARED_BYTES["sm_90a"]
    store_bytes = _STORE_BUFFER_BYTES * (2 if two_fit else 1)
    stores = "" if tma_store else ", direct stores"
    return Variant(
        kernel=kernel,
        header="fused_linear_sm90.cuh",
        template=f"FusedLinearSm90<{operands}, {problem.out_dtype.cuda_name}, epilogue::{epilogue}, {numbers}>",
        description=(
            f"{kernel}<{described(problem, problem.precision)}, {tile.block_m}x{tile.block_n}x{block_k}, "
            f"{tile.stages} stages{sums}{stores}>"
        ),
        block_m=tile.block_m,
        block_n=tile.block_n,
        threads=3 * 128,
        min_blocks=1,
        shared_bytes=ring_bytes + (store_bytes if tma_store else 0),
        rate=tile.rate,
        epilogue=problem.epilogue,
        argument=argument_type(problem.epilogue.parameters),
        pack=pack,
        persistent=True,
        band_rows=_BAND_ROWS // tile.block_m,
        store_cost=_STORE_COST,
    )


@functools.cache
def argument_type(parameters: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """The kernel's one argument, for an epilogue with such parameters: FusedLinearSm90Args."""

    fields = [
        ("x", TensorMap),
        ("w", TensorMap),
        ("y", TensorMap),
        ("bias", ctypes.c_void_p),
        ("y_data", ctypes.c_void_p),
        ("y_stride", ctypes.c_longlong),
        ("x_scales", ctypes.c_void_p),
        ("w_scales", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("in_features", ctypes.c_int),
        ("out_features", ctypes.c_int),
        ("band_rows", ctypes.c_int),
        ("x_box_rows", ctypes.c_int),
        ("epilogue", parameters),
    ]

    class Unpadded(ctypes.Structure):
        _fields_ = fields

    class FusedLinearSm90Args(ctypes.Structure):
        _fields_ = (*fields, ("padding", ctypes.c_char * (-ctypes.sizeof(Unpadded) % TENSOR_MAP_ALIGNMENT)))

    return FusedLinearSm90Args


def pack(variant: Variant, operands: Operands) -> ctypes.Structure:
    """The argument of a launch. The GPU's context is current.

    Raises:
        ShapeError: a stride beyond what tensor maps hold.
        DriverError: the driver refused a tensor map.
    """
    x, w, y, dtype = operands.x, operands.w, operands.y, operands.dtype
    x_box_rows = min(variant.block_m, x.rows)  # rows that x doesn't have need not arrive: their outputs aren't stored
    stores = operands.store_bytes == 16
    return variant.argument(
        x=tensor_map(x, dtype, x_box_rows, operands.as_tf32),
        w=tensor_map(w, dtype, variant.block_n, operands.as_tf32),
        y=tensor_map(y, operands.out_dtype, _Y_BOX_ROWS) if stores else TensorMap(),
        bias=operands.bias,
        y_data=y.address,
        y_stride=y.stride,
        rows=x.rows,
        in_features=x.columns,
        out_features=w.rows,
        band_rows=variant.band_rows,
        x_box_rows=x_box_rows,
        x_scales=operands.x_scales,
        w_scales=operands.w_scales,
        epilogue=operands.epilogue,
    )
