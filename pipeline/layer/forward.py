"""What is computed: the formula, its float64 reference, its checks, and one batch of it on the CPU or a GPU.

For x (rows, in_features), W (out_features, in_features), b (out_features,):

    z = x @ W.T + b
    y = scaling_factor * sigmoid(z) + z          y (rows, out_features)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import HostArray, byte_range, is_cuda, is_torch, overlaps, to_float64
from pipeline.dtypes import FLOAT64, DType, parse_dtype
from pipeline.errors import DTypeError, OptionError, ShapeError
from pipeline.layer import host_threads as row_threads

if TYPE_CHECKING:
    import torch

    from pipeline.kernels.choose import Problem
    from pipeline.kernels.launch import Launcher, PreparedLaunch

# Rows are computed on the CPU at their place on this grid, with zero rows filling up both ends, so that a row's bits
# don't depend on the rows beside it. BLAS libraries change them with the row count: MKL's float32 product in tiles
# that aren't full (multiples of 4), its float64 product where it splits the sum (up to 64 rows and 32 columns). They
# change them with their threads, too (MKL splits the sum among its own): each product runs in one, and which columns it
# has depends on out_features alone. And with the address of x: MKL's float64 product where rows don't start at a cache
# line, its float32 product of up to 11 columns. And MKL's AVX-512 code those of a single input feature with the rows
# beside or the address, which of them isn't known (1,567 random problems on an H100's host, at least three such among
# them with other bits): see `_product`.
CPU_ROW_GRID = 64
_CPU_COLUMN_GRID = 16  # weights of fewer than 64 output features get zero ones up to a multiple of this
ALIGNMENT_BYTES = 16  # of addresses and row strides in device memory
# Rows and columns of one matrix product on the CPU. Narrower products take longer for the same work.
_CPU_PRODUCT_ROWS = 512
_CPU_PRODUCT_COLUMNS = 512
# Results of a block. Threads take turns to run Python, so that a narrow layer's blocks have more rows than a product.
# With half as many 64 features took 7 and 15% longer in two runs (two cores), 512 and more 2 to 4%.
_CPU_BLOCK_RESULTS = 2**19
_TORCH_GRAIN = 2**15  # elements of which torch gives none to other threads
# Inputs of a block, which may have to be copied: few enough for malloc to lend the same memory again.
_CPU_BLOCK_INPUTS = 2**21


def reference(x: Any, weight: Any, bias: Any, scaling_factor: float) -> npt.NDArray[np.float64]:
    """The layer in float64 NumPy: the one definition of right. Shapes as above; bias may be None."""
    z = to_float64(x, "x") @ to_float64(weight, "weight").T
    if bias is not None:
        z += to_float64(bias, "bias")
    return sigmoid_scale_add(z, scaling_factor)


def sigmoid_scale_add(z: HostArray, scaling_factor: float) -> HostArray:
    """scaling_factor * sigmoid(z) + z, in z's element type."""
    with np.errstate(over="ignore", invalid="ignore"):
        return scaling_factor / (1 + np.exp(-z)) + z


def add_scaled_sigmoid(z: torch.Tensor, scaling_factor: float, scratch: torch.Tensor, out: torch.Tensor) -> None:
    """out[:] = scaling_factor * sigmoid(z) + z; `out` may be z. `scratch` has at least z's length; all of one type.

    z and out are 1-D and contiguous. An element's bits don't depend on its place if z's length is a multiple of 64:
    torch's vector and scalar code differ, and parts for its threads may end within a vector, so that none get any here.
    """
    import torch

    # infinite where it is too large for z's type: add would raise
    alpha = torch.tensor(scaling_factor, dtype=z.dtype, device="cpu").item()
    at_once = max(1, len(z)) if torch.get_num_threads() == 1 else _TORCH_GRAIN
    for first in range(0, len(z), at_once):
        part = z[first : first + at_once]
        torch.add(part, torch.sigmoid(part, out=scratch[: len(part)]), alpha=alpha, out=out[first : first + at_once])


def check_scaling_factor(value: Any) -> float:
    """`value` as a float.

    Raises:
        OptionError: not a number, NaN or infinite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"scaling_factor is {value!r}, expected one finite number") from None
    if not math.isfinite(number):
        raise OptionError(f"scaling_factor is {number}, expected a finite number: every result would be lost")
    return number


def check_rows(shape: tuple[int, ...], in_features: int, what: str = "x", example: str = "") -> None:
    """Check the shape of input rows; `what` is what the message calls them, `example` how they are reshaped.

    Raises:
        ShapeError: `shape` isn't (rows, in_features).
    """
    if len(shape) != 2:
        example = example or f"{what if what.isidentifier() else 'x'}.reshape(-1, {in_features})"
        raise ShapeError(
            f"{what} has shape {tuple(shape)}, expected 2 dimensions (rows, {in_features}); reshape it first, for "
            f"example {example}"
        )
    if shape[1] != in_features:
        raise ShapeError(
            f"{what} has {shape[1]} features a row (shape {tuple(shape)}), the layer's weight takes {in_features}; "
            f"pass the rows and the weights that belong together"
        )


def check_dtype(dtype: DType, expected: DType, what: str = "x", remedy: str = "") -> None:
    """Check the element type of rows against the layer's; `remedy` is what the message says to do.

    Raises:
        DTypeError: `dtype` isn't the expected one.
    """
    if dtype is not expected:
        in_numpy = f".astype('{expected}') in NumPy or " if expected.in_numpy else ""
        remedy = remedy or f"convert one, for example with {in_numpy}.to(torch.{expected}) in torch"
        raise DTypeError(f"{what} is {dtype}, the layer's weights are {expected}: {remedy}")


def check_weights(
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    *,
    weight: str = "weight",
    bias: str = "the bias",
) -> None:
    """Check the shapes of weight and bias; `weight` and `bias` are what messages call them.

    Raises:
        ShapeError: the weight isn't (out_features, in_features) with both at least 1, or the bias isn't
            (out_features,).
    """
    if len(weight_shape) != 2:
        raise ShapeError(f"{weight} has shape {tuple(weight_shape)}, expected 2 dimensions (out_features, in_features)")
    if 0 in weight_shape:
        raise ShapeError(f"{weight} has shape {tuple(weight_shape)}: a layer needs at least 1 feature in and out")
    if bias_shape is not None and tuple(bias_shape) != (weight_shape[0],):
        hint = ""
        if len(bias_shape) == 2:
            hint = "; the residual is the layer's own linear output, so no residual tensor is passed"
        elif tuple(bias_shape) == (weight_shape[1],):
            hint = f"; transpose {weight}, (out_features, in_features) is expected"
        raise ShapeError(
            f"{bias} has shape {tuple(bias_shape)}, expected ({weight_shape[0]},): one value an output feature, "
            f"{weight} has shape {tuple(weight_shape)}{hint}"
        )


def check_out(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Check the shape of an output.

    Raises:
        ShapeError: an output's shape isn't the expected one.
    """
    if tuple(shape) != expected:
        raise ShapeError(
            f"out has shape {tuple(shape)}, expected {expected}: one row a source row, (rows, out_features); pass one "
            f"of that shape, or leave it out"
        )


def check_gpu_out(x: torch.Tensor, out: Any, out_features: int) -> None:
    """Check a CUDA output tensor against its input.

    Raises:
        ShapeError, DTypeError, OptionError: shape, element type, device, layout, or memory shared with `x`.
    """
    if not is_cuda(out) or out.device != x.device:
        where = out.device if is_torch(out) else type(out).__name__
        raise OptionError(f"out is on {where}, x is on {x.device}; they must be on one GPU")
    check_out(tuple(out.shape), (x.shape[0], out_features))
    check_gpu_layout(out)
    if overlaps(byte_range(x), byte_range(out)):
        raise OptionError("out overlaps x; pass other memory, the layer can't run in place")


def check_gpu_layout(out: torch.Tensor) -> None:
    """Check that kernels can write a CUDA tensor.

    Raises:
        DTypeError, OptionError: element type or strides.
    """
    if parse_dtype(out.dtype, "out dtype", "pass one of these") is FLOAT64:
        raise DTypeError("out is float64, which only the CPU computes; pass float32, bfloat16 or float16")
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise OptionError(f"out has strides {out.stride()}, expected contiguous rows (the last stride 1)")
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        raise OptionError(f"out has strides {out.stride()}: its rows overlap each other")


class HostWeights:
    """The layer's weights as the CPU computes with them: float64 for float64 data, float32 for all else."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        import torch

        self.compute_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.out_features = weight.shape[0]
        weight = weight.detach().to(self.compute_dtype)
        bias = None if bias is None else bias.detach().to(self.compute_dtype)
        if self.out_features < 64:
            more = -self.out_features % _CPU_COLUMN_GRID
            weight = torch.nn.functional.pad(weight, (0, 0, 0, more))
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, more))
        self.transposed, self.bias = weight.t(), bias
        starts = range(0, max(1, len(weight) - _CPU_PRODUCT_COLUMNS // 2), _CPU_PRODUCT_COLUMNS)
        edges = [*starts, len(weight)]  # the last block takes the rest
        self.column_blocks = [slice(*edge) for edge in itertools.pairwise(edges)]
        # NOTE: MKL's AVX-512 float64 product of 64 or 128 rows and more than 192 columns has other bits than that of
        # more rows, in one thread, too (torch 2.13, MKL 2024.2); float32 products of 64 to 512 rows and at least 64
        # columns have the same. All others are of 64 rows, whatever the block's.
        same_bits = self.compute_dtype == torch.float32 and len(weight) >= 64
        self.product_rows = _CPU_PRODUCT_ROWS if same_bits else CPU_ROW_GRID
        widest = max(block.stop - block.start for block in self.column_blocks)
        rows = min(max(_CPU_PRODUCT_ROWS, _CPU_BLOCK_RESULTS // widest), _CPU_BLOCK_INPUTS // max(1, weight.shape[1]))
        self.block_rows = max(1, rows // CPU_ROW_GRID) * CPU_ROW_GRID

    def forward(self, x: torch.Tensor, out: torch.Tensor, scaling_factor: float, first_row: int = 0) -> None:
        """out[:] = layer(x), rounded once. `first_row` is the row's number in its dataset (see CPU_ROW_GRID).

        x (rows, in_features), out (rows, out_features): CPU tensors of any strides and element types. Blocks of rows
        are shared among as many threads as torch uses in the calling one, or their columns where they are fewer.
        """
        import torch

        rows, lead = x.shape[0], first_row % CPU_ROW_GRID
        threads = row_threads.torch_threads()
        share = -(-(rows + lead) // (threads * CPU_ROW_GRID)) * CPU_ROW_GRID
        block_rows = max(CPU_ROW_GRID, min(self.block_rows, share))
        starts = range(-lead, rows, block_rows)
        parts = [self.column_blocks] if len(starts) >= threads else [[columns] for columns in self.column_blocks]
        scratch: deque[_Scratch] = deque()

        def compute(task: tuple[int, list[slice]]) -> None:
            start, columns = task
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):  # autocast would round z
                mine = scratch.pop() if scratch else _Scratch(self, block_rows)
                self._forward_block(x, out, scaling_factor, start, min(start + block_rows, rows), columns, mine)
                scratch.append(mine)

        row_threads.each(compute, itertools.product(starts, parts), threads)

    def _forward_block(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        scaling_factor: float,
        start: int,
        stop: int,
        column_blocks: list[slice],
        scratch: _Scratch,
    ) -> None:
        """Rows [start, stop), where `start` is on the grid; rows before 0 aren't there and count as zeros."""
        import torch

        first = max(start, 0)
        skipped, rows = first - start, stop - start
        padded = -(-rows // CPU_ROW_GRID) * CPU_ROW_GRID
        block = x[first:stop]
        in_place = block.dtype == self.compute_dtype and block.is_contiguous()
        if self.compute_dtype == torch.float64:  # see CPU_ROW_GRID
            in_place &= block.data_ptr() % 64 == 0
        if padded != stop - first or not in_place:
            block = scratch.x[:padded]
            block[:skipped] = 0
            block[skipped:rows] = x[first:stop]
            block[rows:] = 0
        for columns in column_blocks:
            target = out[first:stop, columns]  # without the zero features of narrow weights
            shape = padded, columns.stop - columns.start
            direct = target.shape == shape and target.dtype == self.compute_dtype and target.is_contiguous()
            # NOTE: the product is not made in the target even where it could be: in memory that stays in the core's
            # cache, with one pass over the target, it takes 8.7 ns a result instead of 9.2 (512 -> 512, two cores).
            z = scratch.z[: shape[0] * shape[1]]
            self._product(block, columns, z.view(shape))
            add_scaled_sigmoid(z, scaling_factor, scratch.sigmoid, target.view(-1) if direct else z)
            if not direct:
                target.copy_(z.view(shape)[skipped:rows, : target.shape[1]])

    def _product(self, x: torch.Tensor, columns: slice, z: torch.Tensor) -> None:
        """z[:] = x @ W.T + b for some of the columns: products of `product_rows` rows in one call, then the rest."""
        import torch

        weight = self.transposed[:, columns]
        if len(weight) == 1:  # a product and a sum, each rounded: the same bits everywhere
            torch.mul(x, weight, out=z)
            if self.bias is not None:
                z += self.bias[columns]
            return
        even = len(x) // self.product_rows * self.product_rows
        for first, stop, rows in (0, even, self.product_rows), (even, len(x), len(x) - even):
            if first == stop:
                continue
            count = (stop - first) // rows
            products = z[first:stop].view(count, rows, -1)
            operands = x[first:stop].view(count, rows, -1), weight.expand(count, -1, -1)
            if self.bias is None:
                torch.bmm(*operands, out=products)
            else:
                torch.baddbmm(self.bias[columns], *operands, out=products)


class _Scratch:
    """Memory for one block of rows, used for one after the other, since fresh pages cost time."""

    def __init__(self, weights: HostWeights, rows: int) -> None:
        import torch

        columns = max(block.stop - block.start for block in weights.column_blocks)
        self.x = torch.empty(rows, weights.transposed.shape[0], dtype=weights.compute_dtype, device="cpu")
        self.z = torch.empty(rows * columns, dtype=weights.compute_dtype, device="cpu")
        self.sigmoid = torch.empty(rows * columns, dtype=weights.compute_dtype, device="cpu")


def rows_for_kernel(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix`, or a copy where its rows aren't contiguous and aligned as the fastest kernel of each GPU wants them.

    NOTE: which kernel runs depends on alignment, and two kernels may differ in the last bit. With the copy, bits depend
    on values alone, and the faster kernel makes up for it.
    """
    row_stride, stride = matrix.stride()
    rows, columns = matrix.shape
    itemsize = matrix.element_size()
    scattered = stride != 1 and columns > 1
    repeated = row_stride == 0 and rows > 1
    if not (scattered or repeated or (matrix.data_ptr() | row_stride * itemsize) % ALIGNMENT_BYTES):
        return matrix
    width = -(-columns * itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES // itemsize
    copy = matrix.new_empty((rows, width))[:, :columns]
    copy.copy_(matrix)
    return copy


def prepare_on_gpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scaling_factor: float,
    precision: str,
    out: torch.Tensor,
    split: torch.Tensor | None = None,
) -> PreparedLaunch | SplitLaunch | None:
    """The launch of out[:] = layer(x), or None for no outputs.

    All tensors on one GPU, `x` and `weight` as `rows_for_kernel` leaves them, `out` with any row stride, `bias`
    contiguous. `split` is what `split_on_gpu` gave for the weight.
    """
    from pipeline.kernels.choose import Problem
    from pipeline.kernels.launch import Launcher

    problem = Problem(parse_dtype(x.dtype), parse_dtype(out.dtype), precision, weight.shape[1], weight.shape[0])
    launcher = Launcher.for_device(x.device.index)
    bias_address = 0 if bias is None else bias.data_ptr()
    if split is not None:
        return SplitLaunch(launcher, problem, x, weight, bias_address, scaling_factor, out, split) if len(x) else None
    matrices = (x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0))
    target = (bias_address, out.data_ptr(), out.stride(0))
    return launcher.prepare_launch(problem, x.shape[0], *matrices, *target, scaling_factor)


class SplitLaunch:
    """A launch of the fp32-accurate layer, but for the stream and for the memory of x's parts, which torch lends to
    each call. Like `PreparedLaunch` it holds addresses, not memory."""

    def __init__(
        self,
        launcher: Launcher,
        problem: Problem,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: int,
        scaling_factor: float,
        out: torch.Tensor,
        split: torch.Tensor,
    ) -> None:
        from pipeline.kernels.split import SplitRows, prepare_split_launch

        self._device, self._x_split = x.device, SplitRows(0, *x.shape)
        self._prepare = functools.partial(
            prepare_split_launch,
            launcher,
            problem,
            rows=x.shape[0],
            x=x.data_ptr(),
            x_stride=x.stride(0),
            w=weight.data_ptr(),
            w_stride=weight.stride(0),
            w_split=SplitRows(split.data_ptr(), *weight.shape),
            bias=bias,
            y=out.data_ptr(),
            y_stride=out.stride(0),
            scaling_factor=scaling_factor,
        )

    def queue(self, stream: int) -> None:
        """Queue the layer on `stream`, the device's current one, and return without waiting for it."""
        import torch

        # Freed on return; torch gives it to others only after the launch, in the stream's order.
        memory = torch.empty(self._x_split.n_bytes, dtype=torch.uint8, device=self._device)
        self._prepare(x_split=replace(self._x_split, address=memory.data_ptr())).queue(stream)


def split_on_gpu(weight: torch.Tensor, precision: str, out_dtype: DType) -> torch.Tensor | None:
    """Memory with the weight's rows split for the fp32-accurate kernel, queued on the current stream; None where that
    kernel doesn't run. `weight` as `rows_for_kernel` leaves it.
    """
    import torch

    from pipeline.kernels.choose import Problem
    from pipeline.kernels.launch import Launcher
    from pipeline.kernels.split import PreparedSplit, SplitRows, is_split

    rows, columns = weight.shape
    launcher = Launcher.for_device(weight.device.index)
    problem = Problem(parse_dtype(weight.dtype), out_dtype, precision, columns, rows)
    if rows == 0 or not is_split(launcher, problem):
        return None
    memory = torch.empty(SplitRows(0, rows, columns).n_bytes, dtype=torch.uint8, device=weight.device)
    split = SplitRows(memory.data_ptr(), rows, columns)
    PreparedSplit(launcher, weight.data_ptr(), weight.stride(0), rows, split).queue(_stream_of(weight))
    return memory


def _stream_of(tensor: torch.Tensor) -> int:
    import torch

    return int(torch.cuda.current_stream(tensor.device.index).cuda_stream)


def launch_on_gpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scaling_factor: float,
    precision: str,
    out: torch.Tensor,
    split: torch.Tensor | None = None,
) -> None:
    """Queue the fused kernel on the caller's current CUDA stream: out[:] = layer(x). Returns before it has run.

    All tensors on one GPU; `x` and `weight` may have any strides, `out` any row stride, `bias` is contiguous. `split`
    is what `split_on_gpu` gave for the weight; without it the weight is split anew where that is needed.
    """
    import torch

    with torch.cuda.device(x.device.index):  # for the copies that torch makes
        x, weight = rows_for_kernel(x), rows_for_kernel(weight)
        if split is None:
            split = split_on_gpu(weight, precision, parse_dtype(out.dtype))
        prepared = prepare_on_gpu(x, weight, bias, scaling_factor, precision, out, split)
        if prepared is not None:
            prepared.queue(_stream_of(x))
