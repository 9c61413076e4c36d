"""The host twin of csrc/gpu/split_rows.cuh: fp32 rows split into scaled fp16 pairs, and where these lie in memory."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from pipeline.errors import OptionError
from pipeline.kernels.fused_linear import ExactRows, Matrix
from pipeline.kernels.variant import Variant, alignment

_GROUP = 32  # elements whose parts lie together
_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 8


class SplitRowsArgs(ctypes.Structure):
    """The kernel's one argument."""

    _fields_ = (
        ("v", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("exact_rows", ctypes.c_void_p),
        ("exact_count", ctypes.c_void_p),
        ("all_exact", ctypes.c_void_p),
        ("total_exact", ctypes.c_void_p),
        ("v_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
    )


VARIANT = Variant(
    kernel="split_rows",
    header="split_rows.cuh",
    template="SplitRows",
    description="split_rows",
    block_m=1,
    block_n=1,
    threads=_THREADS,
    min_blocks=1,
    shared_bytes=0,
    argument=SplitRowsArgs,
)


class SplitRows(NamedTuple):
    """Device memory for split rows: `n_bytes` of it at `address`, a multiple of 256, for (rows, columns) of fp32.

    The parts, then a scale for each row, then the exact rows: their list and their number.
    """

    address: int
    rows: int
    columns: int

    @property
    def part_columns(self) -> int:
        """fp16 elements of a row of parts."""
        return -(-self.columns // _GROUP) * _GROUP * 2

    @property
    def scales(self) -> int:
        return self.address + self.rows * self.part_columns * 2

    @property
    def exact(self) -> ExactRows:
        rows = self.scales + self.rows * 4
        return ExactRows(rows, rows + self.rows * 4)

    @property
    def n_bytes(self) -> int:
        return self.exact.count + 4 - self.address

    @property
    def parts(self) -> Matrix:
        """The parts, of fp16."""
        return Matrix(self.address, self.rows, self.part_columns, self.part_columns)


def pack(v: Matrix, target: SplitRows, weights: SplitRows | None, total_exact: int) -> SplitRowsArgs:
    """The argument of a launch that splits `v`. `weights` are those of the layer whose x it is, None for weights
    themselves; `total_exact` is the address of a 64-bit count of exact rows, or 0.

    Raises:
        OptionError: v isn't aligned.
    """
    if alignment(16, v.address, v.stride * 4 if v.rows > 1 else 16) != 16:
        raise OptionError(
            f"rows at {v.address:#x}, {v.stride} elements apart, aren't aligned to 16 bytes; copy them first"
        )
    return SplitRowsArgs(
        v=v.address,
        parts=target.address,
        scales=target.scales,
        exact_rows=target.exact.rows,
        exact_count=target.exact.count,
        all_exact=0 if weights is None else weights.exact.count,
        total_exact=total_exact,
        v_stride=v.stride,
        rows=v.rows,
        columns=v.columns,
    )


def blocks(rows: int, multiprocessors: int) -> int:
    """Blocks of the one-dimensional grid."""
    return min(rows, multiprocessors * _BLOCKS_PER_MULTIPROCESSOR)
