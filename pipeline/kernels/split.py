"""Launches of the fp32-accurate layer: operands split into pairs of fp16, and exact fp32 for the rows that need it.

Four operations a launch, in order on one stream: an empty list of wide rows, the split of x into parts (and that list),
the fused layer of the parts, and the fused layer of the listed rows once more in exact fp32. W is split once.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from pipeline.dtypes import FLOAT16
from pipeline.errors import OptionError
from pipeline.kernels.choose import Problem, Variant, alignment, listed_rows_variant, runs_as, split_rows_variant
from pipeline.kernels.driver import call
from pipeline.kernels.launch import Launcher, PreparedLaunch, TmaOperand, in_context

_BLOCKS_PER_MULTIPROCESSOR = 8  # of split_rows, 256 threads each
_GROUP = 32  # elements whose parts lie together (csrc/gpu/split_rows.cu)


class SplitRowsArgs(ctypes.Structure):
    """The one argument of split_rows; the same fields as in csrc/gpu/split_rows.cu."""

    _fields_ = (
        ("v", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("wide_list", ctypes.c_void_p),
        ("wide_count", ctypes.c_void_p),
        ("all_wide", ctypes.c_void_p),
        ("total_wide", ctypes.c_void_p),
        ("v_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
    )


@dataclass(frozen=True)
class SplitRows:
    """Device memory for split rows: `n_bytes` of it at `address`, a multiple of 256, for (rows, columns) of fp32."""

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
    def wide_list(self) -> int:
        return self.scales + self.rows * 4

    @property
    def wide_count(self) -> int:
        return self.wide_list + self.rows * 4

    @property
    def n_bytes(self) -> int:
        return self.wide_count + 4 - self.address

    def operand(self, rows: int) -> TmaOperand:
        """The first `rows` rows of parts, for the copy engine."""
        return TmaOperand(self.address, FLOAT16, rows, self.part_columns, self.part_columns * 2)


class PreparedSplit:
    """What `split_rows` does to one matrix, but for the stream."""

    def __init__(
        self,
        launcher: Launcher,
        v: int,
        v_stride: int,
        rows: int,
        target: SplitRows,
        weights: SplitRows | None = None,
        total_wide: int = 0,
    ) -> None:
        """`v` is the device address of (rows, columns) fp32, `v_stride` counts elements; both in bytes are multiples of
        16. `weights`: those of the layer whose x this is, None for weights themselves. `total_wide`: address of a
        64-bit count of wide rows, or 0.

        Raises:
            OptionError: v isn't aligned.
        """
        if alignment(16, v, v_stride * 4 if rows > 1 else 16) != 16:
            raise OptionError(f"rows at {v:#x}, {v_stride} elements apart, aren't aligned to 16 bytes; copy them first")
        all_wide = 0 if weights is None else weights.wide_count
        sizes = (v_stride, rows, target.columns)
        counted = (target.wide_list, target.wide_count, all_wide, total_wide)
        blocks = min(rows, launcher.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR)
        args = SplitRowsArgs(v, target.address, target.scales, *counted, *sizes)
        self._context, self._count = launcher.context, target.wide_count
        self._launch = PreparedLaunch(launcher.load(split_rows_variant()), launcher.context, blocks, args)

    def queue(self, stream: int) -> None:
        """Queue the split on `stream` and return without waiting for it."""
        with in_context(self._context):
            call("cuMemsetD32Async", self._count, 0, 1, stream)
        self._launch.queue(stream)


class PreparedSplitLaunch:
    """A launch of the fp32-accurate layer, but for the stream. Like `PreparedLaunch` it holds addresses, not memory."""

    def __init__(
        self,
        launcher: Launcher,
        problem: Problem,
        *,
        rows: int,
        x: int,
        x_stride: int,
        x_split: SplitRows,
        w: int,
        w_stride: int,
        w_split: SplitRows,
        bias: int,
        y: int,
        y_stride: int,
        scaling_factor: float,
        total_wide: int = 0,
        variant: Variant | None = None,
    ) -> None:
        """Arguments as `Launcher.launch` takes them. `w_split` holds the split weights, `x_split` room for `rows` rows.

        Raises:
            ShapeError: a size or stride beyond the kernels' index range.
            OptionError: x isn't aligned to 16 bytes.
        """
        split = PreparedSplit(launcher, x, x_stride, rows, x_split, w_split, total_wide)
        store_bytes = alignment(16, y, y_stride * problem.out_dtype.itemsize or 4)
        kernel, blocks = launcher.plan(problem, rows, 16, store_bytes, variant)
        if kernel.variant.persistent:
            fused = launcher.prepare_tma(
                kernel,
                blocks,
                x_split.operand(rows),
                w_split.operand(problem.out_features),
                bias,
                y,
                y_stride,
                problem.out_dtype,
                store_bytes,
                scaling_factor,
                x_split.scales,
                w_split.scales,
            )
        else:
            fused = launcher.prepare_rows(
                kernel,
                blocks,
                x_split.address,
                x_split.part_columns * 2,
                w_split.address,
                w_split.part_columns * 2,
                bias,
                y,
                y_stride,
                rows,
                x_split.part_columns,
                problem.out_features,
                scaling_factor,
                x_scales=x_split.scales,
                w_scales=w_split.scales,
            )

        load_bytes = alignment(16, x, w, x_stride * 4 or 4, w_stride * 4 or 4)
        exact = launcher.load(listed_rows_variant(problem, load_bytes))
        listed = launcher.prepare_rows(
            exact,
            exact.variant.tiles(rows, problem.out_features),
            x,
            x_stride * 4,
            w,
            w_stride * 4,
            bias,
            y,
            y_stride,
            rows,
            problem.in_features,
            problem.out_features,
            scaling_factor,
            row_list=x_split.wide_list,
            row_count=x_split.wide_count,
        )
        self.operations = (split, fused, listed)  # in the order they run

    def queue(self, stream: int) -> None:
        """Queue the layer on `stream` (a raw CUstream) and return without waiting for it.

        Raises:
            DriverError: a launch failed.
        """
        for operation in self.operations:
            operation.queue(stream)


# The same, but those of the last few thousand arguments are remembered: buffers come again, chunk after chunk.
prepare_split_launch = functools.lru_cache(maxsize=4096)(PreparedSplitLaunch)


def is_split(launcher: Launcher, problem: Problem) -> bool:
    """Whether the problem runs through this module on the launcher's device."""
    return runs_as(problem, launcher.arch) == "fp32"
