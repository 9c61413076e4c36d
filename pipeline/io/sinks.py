"""Where rows go: arrays, tensors and files, and the sink that a value stands for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.arrays import HostArray, host_tensor, host_view, is_cuda, is_torch, overlaps
from pipeline.dtypes import Cast, DType, cast_between, parse_dtype
from pipeline.errors import DTypeError, OptionError, OutputError, OutputExistsError
from pipeline.flow import Chunk, DeviceRows, Sink, Source
from pipeline.io.files import MapSink, has_lines, memmap_of, open_map, reserve
from pipeline.io.formats.npy import NpyFileSink
from pipeline.io.memory import ArrayRows
from pipeline.io.sources import CudaSource, reads_from, source_bytes
from pipeline.layer.checks import check_gpu_layout, check_gpu_out, check_out
from pipeline.layer.linear import FusedLinear


class ArraySink(Sink):
    """An array or CPU tensor of the caller's, or a new one."""

    def __init__(self, value: Any, array: HostArray, cast: Cast | None = None, *, fresh: bool = False) -> None:
        self._value, self._array, self._cast, self._fresh = value, array, cast, fresh
        self.where = "fresh memory" if fresh else "memory"

    def target(self, chunk: Chunk) -> ArrayRows:
        return ArrayRows(self._array[chunk.row : chunk.row + chunk.rows], self._cast, fresh=self._fresh)

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
        self._features, self._dtype, self._cast, self._wrap = out_features, dtype, cast, wrap
        self._blocks: dict[int, HostArray] = {}
        try:
            self._whole = self._rows(_memory_bytes() // (out_features * dtype.itemsize))
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
        return ArrayRows(rows, self._cast, fresh=True)

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


def _memory_bytes() -> int:
    """Most of the machine's memory. By default Linux grants an allocation of no more than that, used or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16 * 15


class CudaSink(Sink):
    """A CUDA tensor, written by the kernel itself."""

    where = "device"

    def __init__(self, tensor: Any, dtype: DType) -> None:
        self.tensor, self._itemsize = tensor, dtype.itemsize
        self._all = DeviceRows(tensor.device.index, tensor.data_ptr(), tensor.stride(0), tensor.shape[0], tensor)

    def target(self, chunk: Chunk) -> DeviceRows:
        return self._all.part(chunk.row, chunk.rows, self._itemsize)

    def finish(self, rows: int) -> Any:
        return self.tensor


def open_sink(out: Any, source: Source, layer: FusedLinear, dtype: DType, wire: DType, overwrite: bool) -> Sink:
    """The sink that `out` stands for, checked against source and layer.

    `dtype` is the result's element type, `wire` the one in which it comes from the device. Nothing is created if a
    check fails.

    Raises:
        ShapeError, DTypeError, OptionError, OutputError, OutputExistsError
    """
    if isinstance(out, (str, os.PathLike)):
        return _open_file(os.fspath(out), source, layer, dtype, wire, overwrite)
    if out is None:
        return _new_result(source, layer, dtype, wire)
    if not (is_torch(out) or isinstance(out, np.ndarray)):
        raise OptionError(
            f"out is a {type(out).__name__}, expected None, a NumPy array, a torch tensor or the path of a .npy file"
        )
    if source.rows is None:
        raise OptionError(
            f"out is an array, but the source ({source.kind}) doesn't know its number of rows; leave out=None, give a "
            f"path, or use Pipeline.stream"
        )
    check_out(tuple(out.shape), (source.rows, layer.out_features))
    if is_cuda(out):
        if isinstance(source, CudaSource):
            check_gpu_out(source.tensor, out, layer.out_features)
        check_gpu_layout(out)
        _check_out_dtype(parse_dtype(out.dtype, "out dtype", "pass one of these"), wire)
        return CudaSink(out, dtype)
    array, array_dtype = host_view(out, "out", "pass one of these")
    _check_out_dtype(array_dtype, dtype)
    if not array.flags.writeable:
        raise OptionError("out is read-only; pass an array that can be written")
    if array.size and any(size > 1 and stride == 0 for size, stride in zip(array.shape, array.strides, strict=True)):
        raise OptionError(f"out has strides {array.strides}: its rows or columns share memory; pass a real array")
    addresses = source_bytes(source)
    if addresses is not None and overlaps(addresses, np.lib.array_utils.byte_bounds(array)):
        raise OptionError("out overlaps the source; pass other memory, the layer can't run in place")
    whole, cast = memmap_of(array), cast_between(wire, dtype)
    if whole is None or whole.mode == "c" or not array.size:  # mode "c": pages of its own, not the file's
        return ArraySink(out, array, cast)
    return _open_map_sink(out, array, source, cast)


def _open_map_sink(out: Any, array: HostArray, source: Source, cast: Cast | None) -> Sink:
    """The file behind `out`, with the disk space for its rows taken."""
    if not has_lines(array):
        raise OptionError(
            f"out maps a file and has strides {array.strides}, expected contiguous rows (the last stride "
            f"{array.itemsize}) or columns; pass an array in memory and copy it"
        )
    file = open_map(array, os.O_RDWR)
    if file is None:
        raise OutputError(
            "the file that out maps can't be opened for writing; pass its path, or an array in memory and copy it"
        )
    try:
        if reads_from(source, file):
            raise OptionError(f"out maps the bytes of {file.path} that are the source; the layer can't run in place")
        reserve(file.fd, file.path, file.low, file.high - file.low)
        return MapSink(out, file.layout(array, reads=False), cast)
    except BaseException:
        os.close(file.fd)
        raise


def _check_out_dtype(got: DType, expected: DType) -> None:
    if got is not expected:
        raise DTypeError(f"out is {got}, the result is {expected}; pass out_dtype='{got}' to have it rounded to that")


def _open_file(name: str, source: Source, layer: FusedLinear, dtype: DType, wire: DType, overwrite: bool) -> Sink:
    path = Path(name)
    if path.suffix != ".npy":
        raise OptionError(f"out {name!r} doesn't end in .npy, the only file format written; choose a name that does")
    if dtype.name == "bfloat16":
        raise DTypeError("a .npy file can't hold bfloat16; pass out_dtype='float32' or out_dtype='float16'")
    if path.is_dir():
        raise OutputError(f"{path} is a directory, expected the path of a file to write")
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(f"{path} exists; pass overwrite=True to replace it, or choose another path")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {str(path.parent)!r} of out {name!r} isn't a directory; create it first")
    if source.path is not None and path.exists() and path.samefile(source.path):
        raise OutputError(f"{path} is the source itself; choose another output path")
    return NpyFileSink(path, source.rows, layer.out_features, dtype, wire, overwrite)


def _new_result(source: Source, layer: FusedLinear, dtype: DType, wire: DType) -> Sink:
    if isinstance(source, CudaSource):
        import torch

        device, shape = source.tensor.device, (len(source.tensor), layer.out_features)
        return CudaSink(torch.empty(shape, dtype=getattr(torch, dtype.name), device=device), dtype)
    wrap, cast = wrapper(source, dtype), cast_between(wire, dtype)
    if source.rows is None:
        return GrowingSink(layer.out_features, dtype, cast, wrap)
    array = np.empty((source.rows, layer.out_features), dtype.carrier)
    return ArraySink(wrap(array), array, cast, fresh=True)


def wrapper(source: Source, dtype: DType) -> Any:
    """The function that turns a result in its carrier type into what the caller of this source expects.

    Raises:
        DTypeError: a bfloat16 NumPy result without the ml_dtypes package.
    """
    if source.family == "torch":
        return lambda array: host_tensor(array, dtype)
    if dtype.name != "bfloat16":
        return lambda array: array
    try:
        import ml_dtypes
    except ImportError:
        raise DTypeError(
            "NumPy has no bfloat16 for the result; pass torch tensors, install ml_dtypes, or choose another out_dtype"
        ) from None
    return lambda array: array.view(ml_dtypes.bfloat16)
