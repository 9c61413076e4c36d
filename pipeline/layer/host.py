"""The fused layer on the CPU: products in blocks of rows whose bits depend on neither their neighbours nor threads."""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from pipeline.dtypes import FLOAT32, DType
from pipeline.epilogues import Epilogue
from pipeline.layer import host_threads
from pipeline.layer.base import DeviceLayer
from pipeline.rows import DeviceRows

if TYPE_CHECKING:
    import torch

# Rows are computed at their place on this grid, with zero rows filling up both ends, so that a row's bits don't depend
# on the rows beside it. BLAS libraries change them with the number of rows, with the number of their threads and with
# the address of x: which products do is listed in docs/notes/host_products.md. So each product runs in one thread, and
# which columns it has depends on out_features alone.
CPU_ROW_GRID = 64
_COLUMN_GRID = 16  # weights of fewer than 64 output features get zero ones up to a multiple of this
# Rows and columns of one matrix product. Narrower products take longer for the same work.
_PRODUCT_ROWS = 512
_PRODUCT_COLUMNS = 512
# Results of a block. Threads take turns to run Python, so that a narrow layer's blocks have more rows than a product.
_BLOCK_RESULTS = 2**19
# Inputs of a block, which may have to be copied: few enough for malloc to lend the same memory again.
_BLOCK_INPUTS = 2**21


class HostWeights:
    """The layer's weights as the CPU computes with them: float64 for float64 data, float32 for all else."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: Epilogue) -> None:
        import torch

        self.compute_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().to(self.compute_dtype)
        bias = None if bias is None else bias.detach().to(self.compute_dtype)
        if self.out_features < 64:
            more = -self.out_features % _COLUMN_GRID
            weight = torch.nn.functional.pad(weight, (0, 0, 0, more))
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, more))
        self.transposed, self.bias = weight.t(), bias
        starts = range(0, max(1, len(weight) - _PRODUCT_COLUMNS // 2), _PRODUCT_COLUMNS)
        edges = [*starts, len(weight)]  # the last block takes the rest
        blocks = [slice(*edge) for edge in itertools.pairwise(edges)]
        self.column_blocks = [_Columns(block, epilogue.on_columns(block, self.compute_dtype)) for block in blocks]
        self.any_threads = epilogue.any_threads
        # NOTE: only MKL's float32 products of 64 to 512 rows and at least 64 columns have the same bits for any number
        # of rows (docs/notes/host_products.md). All others are of 64 rows, whatever the block's.
        same_bits = self.compute_dtype == torch.float32 and len(weight) >= 64
        self.product_rows = _PRODUCT_ROWS if same_bits else CPU_ROW_GRID
        widest = max(block.stop - block.start for block in blocks)
        rows = min(max(_PRODUCT_ROWS, _BLOCK_RESULTS // widest), _BLOCK_INPUTS // max(1, weight.shape[1]))
        self.block_rows = max(1, rows // CPU_ROW_GRID) * CPU_ROW_GRID

    def forward(self, x: torch.Tensor, out: torch.Tensor, first_row: int = 0) -> None:
        """out[:] = layer(x), rounded once. `first_row` is the row's number in its dataset (see CPU_ROW_GRID).

        x (rows, in_features), out (rows, out_features): CPU tensors of any strides and element types. Blocks of rows
        are shared among as many threads as torch uses in the calling one, or their columns where they are fewer.
        """
        import torch

        rows, lead = x.shape[0], first_row % CPU_ROW_GRID
        threads = host_threads.torch_threads()
        share = -(-(rows + lead) // (threads * CPU_ROW_GRID)) * CPU_ROW_GRID
        block_rows = max(CPU_ROW_GRID, min(self.block_rows, share))
        starts = range(-lead, rows, block_rows)
        parts = [self.column_blocks] if len(starts) >= threads else [[columns] for columns in self.column_blocks]
        scratch: deque[_Scratch] = deque()

        def compute(task: tuple[int, list[_Columns]]) -> None:
            start, columns = task
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):  # autocast would round z
                mine = scratch.pop() if scratch else _Scratch(self, block_rows)
                self._forward_block(x, out, range(start, min(start + block_rows, rows)), columns, mine)
                scratch.append(mine)

        host_threads.each(compute, itertools.product(starts, parts), threads, one_torch_thread=not self.any_threads)

    def _forward_block(
        self, x: torch.Tensor, out: torch.Tensor, rows: range, column_blocks: list[_Columns], scratch: _Scratch
    ) -> None:
        """Some rows, whose first is on the grid; rows before 0 aren't there and count as zeros."""
        first = max(rows.start, 0)
        skipped = first - rows.start
        padded = -(-len(rows) // CPU_ROW_GRID) * CPU_ROW_GRID
        block = self._padded(x[first : rows.stop], skipped, padded, scratch)
        for columns in column_blocks:
            target = out[first : rows.stop, columns.slice]  # without the zero features of narrow weights
            shape = padded, columns.slice.stop - columns.slice.start
            direct = target.shape == shape and target.dtype == self.compute_dtype and target.is_contiguous()
            # NOTE: the product is not made in the target even where it could be: memory that stays in the core's cache,
            # with one pass over the target, takes less time (docs/notes/host_products.md).
            z = scratch.z[: shape[0] * shape[1]].view(shape)
            self._product(block, columns.slice, z)
            columns.epilogue.write(z, target if direct else z, scratch.epilogue)
            if not direct:
                target.copy_(z[skipped : len(rows), : target.shape[1]])

    def _padded(self, x: torch.Tensor, skipped: int, rows: int, scratch: _Scratch) -> torch.Tensor:
        """x in the computing type, with zero rows: `skipped` of them before it and more after it, up to `rows`."""
        import torch

        in_place = x.dtype == self.compute_dtype and x.is_contiguous() and len(x) == rows
        if in_place and (self.compute_dtype != torch.float64 or x.data_ptr() % 64 == 0):  # see CPU_ROW_GRID
            return x
        block = scratch.x[:rows]
        block[:skipped] = 0
        block[skipped : skipped + len(x)] = x
        block[skipped + len(x) :] = 0
        return block

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


class _Columns(NamedTuple):
    """Columns of one product, and the epilogue for these."""

    slice: slice
    epilogue: Epilogue


class _Scratch:
    """Memory for one block of rows, used for one after the other, since fresh pages cost time."""

    def __init__(self, weights: HostWeights, rows: int) -> None:
        import torch

        columns = max(block.slice.stop - block.slice.start for block in weights.column_blocks)
        self.x = torch.empty(rows, weights.transposed.shape[0], dtype=weights.compute_dtype, device="cpu")
        self.z = torch.empty(rows * columns, dtype=weights.compute_dtype, device="cpu")
        self.epilogue = torch.empty(rows * columns, dtype=weights.compute_dtype, device="cpu")


class HostLayer(DeviceLayer):
    """The fused layer on the CPU."""

    def __init__(self, weights: HostWeights, in_dtype: DType, out_dtype: DType) -> None:
        self._weights, self._in_dtype, self._out_dtype = weights, in_dtype, out_dtype
        self.runs_as = "ieee" if in_dtype is FLOAT32 else in_dtype.name
        self.kernel = f"torch CPU matrix product, {str(weights.compute_dtype).removeprefix('torch.')}"

    def queue(self, x: DeviceRows, y: DeviceRows, first_row: int, stream: int, scratch: int) -> None:
        rows = x.tensor(self._weights.in_features, self._in_dtype)
        self._weights.forward(rows, y.tensor(self._weights.out_features, self._out_dtype), first_row)
