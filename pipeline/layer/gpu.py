"""The fused layer on a GPU: for torch tensors, queued on torch's current stream, and as a device's `DeviceLayer`."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.dtypes import DType, parse_dtype
from pipeline.epilogues import Epilogue, EpilogueCode
from pipeline.kernels.choose import Problem, runs_as
from pipeline.kernels.fused_layer import Weights, describe, prepare, prepare_split, split_weights
from pipeline.kernels.fused_linear import Matrix
from pipeline.kernels.launch import Launcher, PreparedLaunch
from pipeline.kernels.split_rows import SplitRows
from pipeline.layer.base import ALIGNMENT_BYTES, DeviceLayer, Place
from pipeline.rows import DeviceRows

if TYPE_CHECKING:
    import torch

    from pipeline.layer.linear import FusedLinear


# -- torch tensors -----------------------------------------------------------------------------------------------------


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


class PackedEpilogue(NamedTuple):
    """An epilogue as kernels on one GPU take it; `tensors` are the memory that its parameters point to."""

    code: EpilogueCode
    parameters: ctypes.Structure
    tensors: tuple[torch.Tensor, ...] = ()


def pack_epilogue(epilogue: Epilogue, ordinal: int) -> PackedEpilogue:
    """The epilogue with its parameters by feature on GPU `ordinal`, queued on the current stream."""
    import torch

    tensors = {name: torch.tensor(v, device=f"cuda:{ordinal}") for name, v in epilogue.by_feature().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    return PackedEpilogue(epilogue.code(), epilogue.pack(addresses), tuple(tensors.values()))


class _Kernels(NamedTuple):
    """What computes a layer on one GPU; `split` as `split_weights` gives it."""

    launcher: Launcher
    problem: Problem
    split: SplitRows | None


@functools.lru_cache(maxsize=1024)
def _kernels(
    ordinal: int, in_dtype: torch.dtype, out_dtype: torch.dtype, precision: str, shape: torch.Size, code: EpilogueCode
) -> _Kernels:
    """For a weight of such a shape; the last thousand are remembered."""
    launcher = Launcher.for_device(ordinal)
    out_features, in_features = shape
    problem = Problem(parse_dtype(in_dtype), parse_dtype(out_dtype), precision, in_features, out_features, code)
    return _Kernels(launcher, problem, split_weights(launcher, problem))


class TensorWeights:
    """A layer's weights as tensors on one GPU.

    `weight` is as `rows_for_kernel` leaves it, `bias` contiguous. Where the fp32-accurate kernel computes, the weight
    is split here, queued on the current stream.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: PackedEpilogue, precision: str
    ) -> None:
        import torch

        self._memory = [weight, bias, epilogue]  # that addresses below point to
        self._device, self._shape, self._dtype = weight.device, weight.shape, weight.dtype
        self._precision, self._code = precision, epilogue.code
        launcher, _, split = self._kernels(weight.dtype)
        matrix = _matrix(weight)
        if split is not None:
            memory = torch.empty(split.n_bytes, dtype=torch.uint8, device=weight.device)
            self._memory.append(memory)
            split = split._replace(address=memory.data_ptr())
            prepare_split(launcher, matrix, split).queue(_stream_of(weight))
        self._weights = Weights(matrix, 0 if bias is None else bias.data_ptr(), epilogue.parameters, split)

    def _kernels(self, out_dtype: torch.dtype) -> _Kernels:
        return _kernels(self._device.index, self._dtype, out_dtype, self._precision, self._shape, self._code)

    def prepare(self, x: torch.Tensor, out: torch.Tensor) -> PreparedLaunch | ScratchLaunch | None:
        """The launch of out[:] = layer(x), or None for no outputs. It holds addresses, not memory.

        All tensors on one GPU, `x` as `rows_for_kernel` leaves it, `out` with any row stride.
        """
        launcher, problem, _ = self._kernels(out.dtype)
        if self._weights.split is not None:
            return ScratchLaunch(launcher, problem, self._weights, x, out) if len(x) else None
        launch = prepare(launcher, problem, self._weights, _matrix(x), _matrix(out))
        assert launch is None or isinstance(launch, PreparedLaunch)
        return launch


class ScratchLaunch:
    """A launch but for the stream and for memory of its own, which torch lends to each call."""

    def __init__(
        self, launcher: Launcher, problem: Problem, weights: Weights, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        self._prepare = functools.partial(prepare, launcher, problem, weights, _matrix(x), _matrix(out))
        self._device, self._n_bytes = x.device, weights.scratch_bytes(len(x))

    def queue(self, stream: int) -> None:
        """Queue the layer on `stream`, the device's current one, and return without waiting for it."""
        import torch

        # Freed on return; torch gives it to others only after the launch, in the stream's order.
        memory = torch.empty(self._n_bytes, dtype=torch.uint8, device=self._device)
        launch = self._prepare(memory.data_ptr())
        assert launch is not None
        launch.queue(stream)


def _matrix(tensor: torch.Tensor) -> Matrix:
    rows, columns = tensor.shape
    return Matrix(tensor.data_ptr(), rows, columns, tensor.stride(0))


def _stream_of(tensor: torch.Tensor) -> int:
    import torch

    return int(torch.cuda.current_stream(tensor.device.index).cuda_stream)


def launch_on_gpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: PackedEpilogue,
    precision: str,
    out: torch.Tensor,
) -> None:
    """Queue the fused kernel on the caller's current CUDA stream: out[:] = layer(x). Returns before it has run.

    All tensors on one GPU; `x` and `weight` may have any strides, `out` any row stride, `bias` is contiguous.
    """
    import torch

    with torch.cuda.device(x.device.index):  # for the copies that torch makes
        x, weight = rows_for_kernel(x), rows_for_kernel(weight)
        # Kept until all is queued: its memory would else be lent to the launch, as scratch memory.
        weights = TensorWeights(weight, bias, epilogue, precision)
        prepared = weights.prepare(x, out)
        if prepared is not None:
            prepared.queue(_stream_of(x))


# -- devices -----------------------------------------------------------------------------------------------------------


class GpuLayer(DeviceLayer):
    """The fused layer with its weights in a GPU's memory."""

    def __init__(self, layer: FusedLinear, place: Place, out_dtype: DType, chunk_rows: int) -> None:
        code, sizes = layer.epilogue.code(), (layer.in_features, layer.out_features)
        self._problem = Problem(layer.dtype, out_dtype, layer.precision, *sizes, code)
        self._launcher, self._place = Launcher.for_device(place.ordinal), place
        self.runs_as = runs_as(self._problem, self._launcher.arch)
        self._compute_with(layer, chunk_rows)

    def _compute_with(self, layer: FusedLinear, chunk_rows: int) -> None:
        place, problem = self._place, self._problem
        itemsize = problem.in_dtype.itemsize
        stride = -(-problem.in_features * itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES // itemsize
        with ThreadPoolExecutor(1) as pool:  # kernels are loaded, or compiled, while the weights are uploaded
            kernel = pool.submit(describe, self._launcher, problem, chunk_rows, (stride, stride))
            rows = place.upload_rows(layer.weight, "the weight")
        self.kernel = kernel.result()
        weight = Matrix(rows.address, problem.out_features, problem.in_features, rows.stride)
        split, self._exact_count = split_weights(self._launcher, problem), 0
        if split is not None:
            split = split._replace(address=place.allocate(split.n_bytes, "the weight's parts"))
            self._exact_count = place.upload(np.zeros(1, np.uint64), "a counter")
            prepare_split(self._launcher, weight, split).queue(place.stream)
        bias = 0 if layer.bias is None else place.upload(layer.bias, "the bias")
        vectors = {
            name: place.upload(vector, f"the epilogue's {name}") for name, vector in layer.epilogue.by_feature().items()
        }
        self._weights = Weights(weight, bias, layer.epilogue.pack(vectors), split)

    def slot_bytes(self, chunk_rows: int) -> int:
        return self._weights.scratch_bytes(chunk_rows)

    def queue(self, x: DeviceRows, y: DeviceRows, first_row: int, stream: int, scratch: int) -> None:
        launch = prepare(
            self._launcher,
            self._problem,
            self._weights,
            Matrix(x.address, x.rows, self._problem.in_features, x.stride),
            Matrix(y.address, y.rows, self._problem.out_features, y.stride),
            scratch,
            self._exact_count,
        )
        if launch is not None:
            launch.queue(stream)

    def exact_rows(self) -> int:
        if self._weights.split is None:
            return 0
        return int.from_bytes(self._place.read(self._exact_count, 8), "little")
