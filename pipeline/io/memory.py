"""Arrays and tensors as sources and sinks: in the host's memory, and in a GPU's, where kernels use them in place."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pipeline.arrays import HostArray, address_of, byte_range, convert, host_tensor, host_view, is_cuda, is_torch
from pipeline.config import MIB
from pipeline.dtypes import Cast, DType, cast_between, parse_dtype
from pipeline.errors import DTypeError, InputError, OptionError
from pipeline.flow import Chunk, Sink, Source, Span
from pipeline.io.mapped import is_in_file, memmap_of, open_map, open_map_sink, open_map_source
from pipeline.io.registry import SinkRequest, SourceRequest
from pipeline.layer.checks import check_gpu_layout, check_gpu_out, check_out
from pipeline.pages import RESULTS, memory_bytes
from pipeline.rows import DeviceRows, PlainRows, SourceRows, TargetRows

_RECYCLED_BYTES = 32 * MIB  # results of fewer are an array of NumPy's own


class ArrayRows(SourceRows, TargetRows):
    """Rows of an array of any strides and byte order, read or written; memory that is `fresh` has never been written.

    `cast` is between the array's element type and the wire's.
    """

    def __init__(self, array: HostArray, cast: Cast | None = None, *, fresh: bool = False) -> None:
        self._array, self._cast, self._fresh = array, cast, fresh
        self.array = array if cast is None and array.flags.c_contiguous and array.dtype.isnative else None

    @property
    def plain(self) -> PlainRows | None:
        array = self._array
        contiguous = array.strides[1] == array.itemsize or array.shape[1] <= 1
        if not (array.dtype.isnative and contiguous):
            return None
        return PlainRows(address_of(array), array.strides[0], cast=self._cast, fresh=self._fresh)

    def read(self, first: int, piece: HostArray) -> None:
        convert(piece, self._array[first : first + len(piece)], self._cast)

    def write(self, first: int, piece: HostArray) -> None:
        convert(self._array[first : first + len(piece)], piece, self._cast)


# -- sources -----------------------------------------------------------------------------------------------------------


class ArraySource(Source):
    """A NumPy array or torch CPU tensor of shape (rows, features)."""

    def __init__(self, value: Any, kind: str) -> None:
        self.array, self.dtype = host_view(value, f"the source ({kind})")
        self.rows, self.features = self.array.shape
        self.kind = kind
        self.family = "torch" if is_torch(value) else "numpy"
        if self.array.flags.c_contiguous and memmap_of(self.array) is None:
            self.memory = self.array

    def rows_at(self, row: int, count: int, wire: DType) -> ArrayRows:
        return ArrayRows(self.array[row : row + count], cast_between(self.dtype, wire))

    def spans(self) -> tuple[Span, ...]:
        memory = Span.of_array(self.array)
        file = None if memmap_of(self.array) is None else open_map(self.array)
        if file is None:
            return (memory,)
        try:
            return memory, file.span
        finally:
            os.close(file.fd)


class CudaSource(Source):
    """A CUDA tensor of shape (rows, features): the kernel reads it where it is."""

    kind, family, where = "CUDA tensor", "cuda", "device"

    def __init__(self, tensor: Any) -> None:
        self.dtype = parse_dtype(tensor.dtype, "the source's dtype")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise InputError(
                f"the source is a CUDA tensor with strides {tensor.stride()}, expected contiguous rows (the last "
                f"stride 1); use x.contiguous()"
            )
        self.tensor = tensor.detach()
        self.rows, self.features = self.tensor.shape
        self._all = _device_rows(self.tensor)

    def rows_at(self, row: int, count: int, wire: DType) -> DeviceRows:
        return self._all.part(row, count, self.dtype.itemsize)

    def spans(self) -> tuple[Span, ...]:
        return (Span(*byte_range(self.tensor)),)


def open_source(value: Any, request: SourceRequest) -> Source:
    """The source of an array or tensor. What lies in one piece in a file is read from there, unless copy engines can
    read the map in place."""
    request.check_rows(tuple(value.shape))
    if is_cuda(value):
        return CudaSource(value)
    source = ArraySource(value, "torch tensor" if is_torch(value) else "NumPy array")
    if is_in_file(source.array) and not request.is_pinned(source.array):
        return open_map_source(source.array, source.dtype) or source
    return source


# -- sinks -------------------------------------------------------------------------------------------------------------


class ArraySink(Sink):
    """An array or CPU tensor of the caller's, or a new one."""

    def __init__(self, value: Any, array: HostArray, cast: Cast | None = None, *, fresh: bool = False) -> None:
        self._value, self._array, self.cast, self._fresh = value, array, cast, fresh
        self.where = "fresh memory" if fresh else "memory"

    def target(self, chunk: Chunk) -> ArrayRows:
        return ArrayRows(self._array[chunk.row : chunk.row + chunk.rows], self.cast, fresh=self._fresh)

    def finish(self, rows: int) -> Any:
        return self._value


class GrowingSink(Sink):
    """A new array for a source that doesn't know its length.

    It is the beginning of an array as large as the machine's memory, of which the system gives the pages that rows are
    written to: what is joined at the end of a run would be written twice. Where it refuses (a limit on address space),
    and beyond, rows are a block a chunk, and joined.
    """

    where = "fresh memory"

    def __init__(self, out_features: int, dtype: DType, cast: Cast | None, wrap: Any) -> None:
        self._features, self._dtype, self.cast, self._wrap = out_features, dtype, cast, wrap
        self._blocks: dict[int, HostArray] = {}
        try:
            self._whole = self._rows(_most_memory_bytes() // (out_features * dtype.itemsize))
        except MemoryError:
            self._whole = self._rows(0)

    def _rows(self, rows: int) -> HostArray:
        return np.empty((rows, self._features), self._dtype.carrier)

    def target(self, chunk: Chunk) -> ArrayRows:
        end = chunk.row + chunk.rows
        if end <= len(self._whole):
            rows = self._whole[chunk.row : end]
        else:
            rows = self._blocks[chunk.row] = self._rows(chunk.rows)
        return ArrayRows(rows, self.cast, fresh=True)

    def finish(self, rows: int) -> Any:
        if not self._blocks:
            return self._wrap(self._whole[:rows])
        whole, first = self._rows(rows), min(self._blocks)
        whole[:first] = self._whole[:first]
        self._whole = whole
        for row in sorted(self._blocks):  # each block is freed as soon as it is copied: no second copy of it all
            block = self._blocks.pop(row)
            whole[row : row + len(block)] = block
        return self._wrap(whole)


def _most_memory_bytes() -> int:
    """Most of the machine's memory. By default Linux grants an allocation of no more than that, used or not."""
    return memory_bytes() // 16 * 15


class CudaSink(Sink):
    """A CUDA tensor, written by the kernel itself."""

    where = "device"

    def __init__(self, tensor: Any, dtype: DType) -> None:
        self.tensor, self._itemsize = tensor, dtype.itemsize
        self._all = _device_rows(tensor)

    def target(self, chunk: Chunk) -> DeviceRows:
        return self._all.part(chunk.row, chunk.rows, self._itemsize)

    def finish(self, rows: int) -> Any:
        return self.tensor


def _device_rows(tensor: Any) -> DeviceRows:
    return DeviceRows(tensor.device.index, tensor.data_ptr(), tensor.stride(0), tensor.shape[0], tensor)


def open_sink(out: Any, request: SinkRequest) -> Sink:
    """The sink that writes to an array or tensor of the caller's.

    Raises:
        ShapeError, DTypeError, OptionError, OutputError: it isn't of the result's shape or type, can't be written, or
            shares memory with the source.
    """
    source, dtype, wire = request.source, request.dtype, request.wire
    if source.rows is None:
        raise OptionError(
            f"out is an array, but the source ({source.kind}) doesn't know its number of rows; leave out=None, give a "
            f"path, or use Pipeline.stream"
        )
    check_out(tuple(out.shape), (source.rows, request.out_features))
    if is_cuda(out):
        if source.tensor is not None:
            check_gpu_out(source.tensor, out, request.out_features)
        check_gpu_layout(out)
        check_out_dtype(parse_dtype(out.dtype, "out dtype", "pass one of these"), wire)
        return CudaSink(out, dtype)
    array, array_dtype = host_view(out, "out", "pass one of these")
    check_out_dtype(array_dtype, dtype)
    if not array.flags.writeable:
        raise OptionError("out is read-only; pass an array that can be written")
    if array.size and any(size > 1 and stride == 0 for size, stride in zip(array.shape, array.strides, strict=True)):
        raise OptionError(f"out has strides {array.strides}: its rows or columns share memory; pass a real array")
    if any(Span.of_array(array).overlaps(span) for span in source.spans()):
        raise OptionError("out overlaps the source; pass other memory, the layer can't run in place")
    whole = memmap_of(array)
    if whole is None or whole.mode == "c" or not array.size:  # mode "c": pages of its own, not the file's
        return ArraySink(out, array, request.cast)
    return open_map_sink(out, array, source, request.cast)


def check_out_dtype(got: DType, expected: DType) -> None:
    """Check the element type of an output. Raises DTypeError."""
    if got is not expected:
        raise DTypeError(f"out is {got}, the result is {expected}; pass out_dtype='{got}' to have it rounded to that")


def new_result(request: SinkRequest) -> Sink:
    """The sink that makes a new array or tensor of the source's family."""
    source, dtype = request.source, request.dtype
    if source.tensor is not None:
        import torch

        shape = (len(source.tensor), request.out_features)
        return CudaSink(torch.empty(shape, dtype=getattr(torch, dtype.name), device=source.tensor.device), dtype)
    wrap = wrapper(source, dtype)
    if source.rows is None:
        return GrowingSink(request.out_features, dtype, request.cast, wrap)
    shape = source.rows, request.out_features
    n_bytes = shape[0] * shape[1] * dtype.itemsize
    if n_bytes < _RECYCLED_BYTES:
        return ArraySink(wrap(array := np.empty(shape, dtype.carrier)), array, request.cast, fresh=True)
    memory, recycled = RESULTS.take(n_bytes)
    array = memory.view(dtype.carrier).reshape(shape)
    return ArraySink(wrap(array), array, request.cast, fresh=not recycled)


def wrapper(source: Source, dtype: DType) -> Any:
    """The function that turns a result in its carrier type into what the caller of this source expects.

    Raises:
        DTypeError: a NumPy result of a type that only the ml_dtypes package has, which isn't installed.
    """
    if source.family == "torch":
        return lambda array: host_tensor(array, dtype)
    if dtype.in_numpy:
        return lambda array: array
    try:
        numpy_type = dtype.numpy_type()
    except (ImportError, AttributeError):
        raise DTypeError(
            f"NumPy has no {dtype} for the result; pass torch tensors, install ml_dtypes, or choose another out_dtype"
        ) from None
    return lambda array: array.view(numpy_type)
