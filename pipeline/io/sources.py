"""Where rows come from: arrays, tensors, files and iterables, and the source that a value stands for."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np

from pipeline.arrays import HostArray, byte_range, host_view, is_cuda, is_torch
from pipeline.config import DType, parse_dtype
from pipeline.devices.base import DeviceRows
from pipeline.errors import FileFormatError, InputError
from pipeline.forward import check_rows
from pipeline.io.batches import BatchSource
from pipeline.io.jobs import cast_between
from pipeline.io.npy import NpyFileSource
from pipeline.io.rows import ArrayRows, BatchResult, Feed, Gather, RangeFeed, Source
from pipeline.layer import FusedLinear


class ArraySource(Source):
    """A NumPy array (memmaps too) or torch CPU tensor of shape (rows, features)."""

    def __init__(self, value: Any, kind: str) -> None:
        self.array, self.dtype = host_view(value, f"the source ({kind})")
        self.rows, self.features = self.array.shape
        self.kind = kind
        self.family = "torch" if is_torch(value) else "numpy"

    def feed(self, chunk_rows: int, gather: Gather, wire: DType) -> Feed:
        array, cast = self.array, cast_between(self.dtype, wire)
        return RangeFeed(array.shape[0], chunk_rows, lambda row, n: ArrayRows(array[row : row + n], cast))


class CudaSource(Source):
    """A CUDA tensor of shape (rows, features): the kernel reads it where it is."""

    kind, family = "CUDA tensor", "cuda"

    def __init__(self, tensor: Any) -> None:
        self.dtype = parse_dtype(tensor.dtype, "the source's dtype")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise InputError(
                f"the source is a CUDA tensor with strides {tensor.stride()}, expected contiguous rows (the last "
                f"stride 1); use x.contiguous()"
            )
        self.tensor = tensor.detach()
        self.rows, self.features = self.tensor.shape
        self._all = DeviceRows(tensor.device.index, tensor.data_ptr(), tensor.stride(0), self.rows, self.tensor)

    def feed(self, chunk_rows: int, gather: Gather, wire: DType) -> Feed:
        itemsize = self.dtype.itemsize
        return RangeFeed(self._all.rows, chunk_rows, lambda row, n: self._all.part(row, n, itemsize))


_MAX_HEADER_BYTES = 16_384  # NumPy reads no header of more than 10,000 characters


def open_npy(path: Path, in_features: int) -> Source:
    """The source of a .npy file. Fortran order and foreign byte order are converted while they are read.

    Raises:
        FileNotFoundError, PermissionError: from opening it.
        FileFormatError: not a .npy file, object elements, or its size isn't what the header says.
        ShapeError, DTypeError
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"source {str(path)!r} isn't a regular file, expected a .npy file")
    size = status.st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_MAX_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"format version {version}")
        shape, fortran, dtype = read_header[version](head)
    except Exception as error:  # NumPy's parser lets many kinds through: TokenError, RecursionError, TypeError, ...
        raise FileFormatError(f"{path} isn't a readable .npy file: {error}; write it with np.save") from error
    offset = head.tell()
    if dtype.hasobject:
        raise FileFormatError(
            f"{path} holds Python objects, expected floating-point numbers; convert and save it again"
        )
    converted = f"convert the file, for example {_saved_again(path, 'float32')}"
    element = parse_dtype(dtype.newbyteorder("="), f"the element type of {path}", converted)
    check_rows(shape, in_features, f"the array in {path}", _saved_again(path, in_features))
    expected = offset + shape[0] * shape[1] * dtype.itemsize
    if size != expected:
        state = "truncated" if size < expected else "followed by other data"
        raise FileFormatError(
            f"{path} is {state}: {size} bytes, its header promises {expected} for shape {shape}; copy or save it again"
        )
    if fortran or not dtype.isnative or 0 in shape:
        array = np.load(path, mmap_mode="r" if 0 not in shape else None, allow_pickle=False)
        source = ArraySource(array, ".npy file" + (" in Fortran order" if fortran else ""))
        source.path = path
        return source
    return NpyFileSource(path, (shape[0], shape[1]), offset, element)


def _saved_again(path: Path, change: str | int) -> str:
    """What saves a file's array with another element type, or with so many features a row."""
    change = f"astype('{change}')" if isinstance(change, str) else f"reshape(-1, {change})"
    return f"np.save('new.npy', np.load('{path}').{change})"


def open_source(value: Any, layer: FusedLinear, on_batch: Callable[[int], BatchResult | None] | None = None) -> Source:
    """The source that `value` stands for, checked against the layer.

    Raises:
        ShapeError, DTypeError, FileFormatError, InputError: it can't be streamed through this layer.
    """
    source: Source
    if isinstance(value, (str, os.PathLike)):
        path = Path(value)
        if path.suffix != ".npy":
            raise InputError(
                f"source {os.fspath(value)!r} doesn't end in .npy, the only file format read; save the array with "
                f"np.save, or pass it itself"
            )
        source = open_npy(path, layer.in_features)
    elif is_torch(value) or isinstance(value, np.ndarray):
        check_rows(tuple(value.shape), layer.in_features, "the source")
        if is_cuda(value):
            source = CudaSource(value)
        else:
            source = ArraySource(value, "torch tensor" if is_torch(value) else "NumPy array")
    elif isinstance(value, GeneratorType) and value.gi_frame is None:  # it would pass for an empty dataset
        raise InputError("source is a generator that has ended already, expected a new one for each run")
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray, dict, set)):
        source = BatchSource(value, layer, on_batch)
    else:
        raise InputError(
            f"source is a {type(value).__name__}, expected a NumPy array, a torch tensor, the path of a .npy file or "
            f"an iterable of batches"
        )
    what, remedy = f"the source ({source.kind})", ""
    if source.path is not None:
        what = f"the array in {source.path}"
        remedy = f"convert the file, for example {_saved_again(source.path, layer.dtype.name)}"
        if layer.dtype.name == "bfloat16":
            remedy = "no .npy file can hold bfloat16; convert the weights, or pass a torch tensor"
    try:
        layer.check_dtype(source.dtype, what, remedy)
    except InputError:
        source.close()
        raise
    return source


def source_bytes(source: Source) -> tuple[int, int] | None:
    """The addresses of a source's memory, first and one after last; None where it has none."""
    if isinstance(source, ArraySource):
        low, high = np.lib.array_utils.byte_bounds(source.array)
        return (low, high)
    if isinstance(source, CudaSource):
        return byte_range(source.tensor)
    return None


def source_file(source: Source) -> tuple[Path, int, int] | None:
    """The file that holds a source's rows, and the positions of its first byte and the one after its last."""
    if isinstance(source, NpyFileSource):
        return source.path, source.offset, source.offset + (source.rows or 0) * source.features * source.dtype.itemsize
    return mapped_file(source.array) if isinstance(source, ArraySource) else None


def mapped_file(array: HostArray) -> tuple[Path, int, int] | None:
    """The same of an array that is, or is a view of, a np.memmap; None for other memory."""
    whole: np.memmap[Any, Any] | None = None
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap) and owner.filename is not None:
            whole = owner
        owner = owner.base
    if whole is None:
        return None
    low, high = np.lib.array_utils.byte_bounds(array)
    shift = whole.offset - np.lib.array_utils.byte_bounds(whole)[0]
    return Path(str(whole.filename)), low + shift, high + shift
