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

from pipeline.arrays import HostArray, byte_range, host_view, is_cuda, is_torch, overlaps
from pipeline.dtypes import DType, cast_between, parse_dtype
from pipeline.errors import FileFormatError, InputError
from pipeline.flow import BatchResult, DeviceRows, Feed, Gather, Source
from pipeline.io.batches import BatchSource
from pipeline.io.files import FileLayout, FileSource, MappedFile, memmap_of, open_map
from pipeline.io.memory import ArrayRows, RangeFeed
from pipeline.layer.checks import check_rows
from pipeline.layer.linear import FusedLinear


class ArraySource(Source):
    """A NumPy array or torch CPU tensor of shape (rows, features)."""

    def __init__(self, value: Any, kind: str) -> None:
        self.array, self.dtype = host_view(value, f"the source ({kind})")
        self.rows, self.features = self.array.shape
        self.kind = kind
        self.family = "torch" if is_torch(value) else "numpy"
        if self.array.flags.c_contiguous and memmap_of(self.array) is None:
            self.memory = self.array

    def feed(self, chunk_rows: int, gather: Gather, wire: DType) -> Feed:
        array, cast = self.array, cast_between(self.dtype, wire)
        return RangeFeed(array.shape[0], chunk_rows, lambda row, n: ArrayRows(array[row : row + n], cast))


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
    rows, features = shape
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    strides = (dtype.itemsize, rows * dtype.itemsize) if fortran else (features * dtype.itemsize, dtype.itemsize)
    layout = FileLayout(
        fd, path, offset, strides, dtype.itemsize, swapped=not dtype.isnative, plain=not fortran and dtype.isnative
    )
    source = FileSource(".npy file" + (" in Fortran order" if fortran else ""), layout, (rows, features), element)
    source.path = path
    return source


def open_array(value: Any, is_pinned: Callable[[HostArray], bool]) -> Source:
    """The source of a NumPy array or torch CPU tensor.

    What lies in one piece in a file is read from there, if the map is shared with it: mode "c" has pages of its own.
    Maps that the copy engines read in place, and views with gaps, are memory like any other.
    """
    source = ArraySource(value, "torch tensor" if is_torch(value) else "NumPy array")
    array = source.array
    whole = memmap_of(array)
    if (
        whole is None
        or whole.mode == "c"
        or not array.size
        or not (array.flags.c_contiguous or array.flags.f_contiguous)
    ):
        return source
    if is_pinned(array):
        return source
    file = open_map(array)
    if file is None:
        return source
    return FileSource("memory-mapped file", file.layout(array), array.shape, source.dtype, array)


def _saved_again(path: Path, change: str | int) -> str:
    """What saves a file's array with another element type, or with so many features a row."""
    change = f"astype('{change}')" if isinstance(change, str) else f"reshape(-1, {change})"
    return f"np.save('new.npy', np.load('{path}').{change})"


def open_source(
    value: Any,
    layer: FusedLinear,
    on_batch: Callable[[int], BatchResult | None] | None = None,
    is_pinned: Callable[[HostArray], bool] = lambda array: False,
) -> Source:
    """The source that `value` stands for, checked against the layer. `is_pinned` says whether the copy engines can
    read an array in place.

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
        source = CudaSource(value) if is_cuda(value) else open_array(value, is_pinned)
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
    if isinstance(source, CudaSource):
        return byte_range(source.tensor)
    array = source.array if isinstance(source, (ArraySource, FileSource)) else None
    if array is None:
        return None
    low, high = np.lib.array_utils.byte_bounds(array)
    return (low, high)


def reads_from(source: Source, file: MappedFile) -> bool:
    """Whether a source's rows are among those bytes of a file."""
    if isinstance(source, FileSource):
        return os.path.sameopenfile(source.layout.fd, file.fd) and overlaps(source.span, (file.low, file.high))
    if not isinstance(source, ArraySource) or memmap_of(source.array) is None:
        return False
    mapped = open_map(source.array)
    if mapped is None:
        return False
    try:
        return os.path.sameopenfile(mapped.fd, file.fd) and overlaps((mapped.low, mapped.high), (file.low, file.high))
    finally:
        os.close(mapped.fd)
