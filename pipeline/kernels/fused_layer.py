"""Launches of a whole layer on one device: one kernel, or those of the fp32-accurate layer.

That one takes four operations a launch, in order on one stream: an empty list of exact rows, the split of x into parts
(and that list), the fused layer of the parts, and the fused layer of the exact rows once more in exact fp32. W is split
once. Whether a layer is split is decided by `split_weights` alone: afterwards its `Weights` have parts or have none.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from typing import NamedTuple

from pipeline.dtypes import FLOAT16
from pipeline.errors import OptionError
from pipeline.kernels import fused_linear_simt, split_rows
from pipeline.kernels.choose import runs_as
from pipeline.kernels.driver import call
from pipeline.kernels.fused_linear import Matrix, Operands
from pipeline.kernels.launch import Launcher, PreparedLaunch, in_context
from pipeline.kernels.split_rows import SplitRows
from pipeline.kernels.variant import Problem, Variant, alignment


class Weights(NamedTuple):
    """A layer's weights in one GPU's memory.

    `bias` is the address of (out_features,) of the data's type, 0 for none; `epilogue` holds the parameters of the
    epilogue (`Epilogue.pack`); `split` are the weight's rows split, for the fp32-accurate layer, else None.
    """

    weight: Matrix
    bias: int
    epilogue: ctypes.Structure
    split: SplitRows | None = None

    def scratch_bytes(self, rows: int) -> int:
        """Device memory that a launch of so many rows needs for itself."""
        return 0 if self.split is None else SplitRows(0, rows, self.weight.columns).n_bytes


def split_weights(launcher: Launcher, problem: Problem) -> SplitRows | None:
    """How large the split weights of the problem's layer are (their address is 0), or None where nothing is split."""
    if problem.out_features == 0 or runs_as(problem, launcher.arch) != "fp32":
        return None
    return SplitRows(0, problem.out_features, problem.in_features)


class PreparedSplit:
    """What `split_rows` does to one matrix, but for the stream."""

    def __init__(
        self,
        launcher: Launcher,
        v: Matrix,
        target: SplitRows,
        weights: SplitRows | None = None,
        total_exact: int = 0,
    ) -> None:
        """Arguments as `split_rows.pack` takes them.

        Raises:
            OptionError: v isn't aligned.
        """
        args = split_rows.pack(v, target, weights, total_exact)
        blocks = split_rows.blocks(v.rows, launcher.multiprocessors)
        self._context, self._count = launcher.context, target.exact.count
        self._launch = PreparedLaunch(launcher.load(split_rows.VARIANT), launcher.context, blocks, args)

    def queue(self, stream: int) -> None:
        """Queue the split on `stream` and return without waiting for it."""
        with in_context(self._context):
            call("cuMemsetD32Async", self._count, 0, 1, stream)
        self._launch.queue(stream)


# Remembers the last few hundred: the operator splits its weight at each call.
prepare_split = functools.lru_cache(maxsize=512)(PreparedSplit)


class PreparedSplitLaunch:
    """A launch of the fp32-accurate layer, but for the stream. Like `PreparedLaunch` it holds addresses, not memory."""

    def __init__(self, *operations: PreparedSplit | PreparedLaunch) -> None:
        self.operations = operations  # in the order they run

    def queue(self, stream: int) -> None:
        """Queue the layer on `stream` (a raw CUstream) and return without waiting for it.

        Raises:
            DriverError: a launch failed.
        """
        for operation in self.operations:
            operation.queue(stream)


@functools.lru_cache(maxsize=4096)
def prepare(
    launcher: Launcher,
    problem: Problem,
    weights: Weights,
    x: Matrix,
    y: Matrix,
    scratch: int = 0,
    total_exact: int = 0,
    variant: Variant | None = None,
) -> PreparedLaunch | PreparedSplitLaunch | None:
    """The launch of y = epilogue(x w^T + bias), or None for no outputs. Those of the last few thousand arguments are
    remembered: buffers come again, chunk after chunk.

    x (rows, in_features), w and y must not overlap. Where weights are split, x is aligned to 16 bytes, `scratch` is the
    address of `weights.scratch_bytes(rows)` of device memory, and `total_exact` that of a 64-bit count of exact rows,
    or 0. `variant` overrides the selection, for tests and benchmarks: one of `candidates` for these operands.

    Raises:
        ShapeError: a size or stride beyond the kernels' index range.
        OptionError: x isn't aligned to 16 bytes where it is split, or a kernel of split weights without them.
    """
    if y.rows == 0 or problem.out_features == 0:
        return None
    operands = Operands(
        x=x,
        w=weights.weight,
        bias=weights.bias,
        y=y,
        dtype=problem.in_dtype,
        out_dtype=problem.out_dtype,
        epilogue=weights.epilogue,
        as_tf32=problem.precision == "tf32",
    )
    if weights.split is not None:
        return _prepare_split(launcher, problem, operands, weights.split, scratch, total_exact, variant)
    kernel = launcher.choose(problem, x.rows, operands.load_bytes, operands.store_bytes, variant)
    if "split" in kernel.variant.kernel:
        raise OptionError(f"{kernel.variant.description} needs split weights: see split_weights")
    return launcher.prepare(kernel, operands)


def _prepare_split(
    launcher: Launcher,
    problem: Problem,
    operands: Operands,
    w_split: SplitRows,
    scratch: int,
    total_exact: int,
    variant: Variant | None,
) -> PreparedSplitLaunch:
    rows = operands.x.rows
    x_split = SplitRows(scratch, rows, problem.in_features)
    split = PreparedSplit(launcher, operands.x, x_split, w_split, total_exact)

    of_parts = replace(
        operands, x=x_split.parts, w=w_split.parts, dtype=FLOAT16, x_scales=x_split.scales, w_scales=w_split.scales
    )
    kernel = launcher.choose(problem, rows, 16, operands.store_bytes, variant)
    fused = launcher.prepare(kernel, of_parts)

    exact = launcher.load(fused_linear_simt.exact_rows_variant(problem, operands.load_bytes))
    exact_rows = launcher.prepare(exact, replace(operands, exact=x_split.exact))
    return PreparedSplitLaunch(split, fused, exact_rows)


def describe(launcher: Launcher, problem: Problem, rows: int, strides: tuple[int, int] | None = None) -> str:
    """Compiles and loads now what `prepare` would need for 16-byte aligned addresses; blocks about a second.

    `strides` are those of x and w in elements; None means contiguous rows. Returns the kernel's description, for
    reports.

    Raises:
        CompileError: with the compiler's log.
        DTypeError, OptionError: no kernel for the problem.
    """
    x_stride, w_stride = strides or 2 * (problem.in_features,)
    load_bytes = alignment(16, *(stride * problem.in_dtype.itemsize for stride in (x_stride, w_stride)))
    store_bytes = alignment(16, problem.out_features * problem.out_dtype.itemsize)
    if split_weights(launcher, problem) is None:
        return launcher.choose(problem, max(rows, 1), load_bytes, store_bytes).variant.description
    fused = launcher.select(problem, max(rows, 1), 16, store_bytes)
    exact = fused_linear_simt.exact_rows_variant(problem, load_bytes)
    launcher.load_all((fused, exact, split_rows.VARIANT))
    return fused.description
