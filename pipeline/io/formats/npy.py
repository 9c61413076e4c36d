"""Files in NumPy's .npy format: numpy.lib.format describes it."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dtypes import DType, parse_dtype
from pipeline.errors import DTypeError, FileFormatError
from pipeline.flow import Sink, Source
from pipeline.io.atomic_file import AtomicFileSink, check_path
from pipeline.io.files import FileLayout, FileSource, check_size, open_regular
from pipeline.io.registry import SinkRequest, SourceRequest

_MAX_HEADER_BYTES = 16_384  # NumPy reads no header of more than 10,000 characters
_HEADER_BYTES = 128  # what `header_bytes` makes


@dataclass(frozen=True)
class Header:
    """What a file's header says, and how many bytes it takes."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    length: int


def read_header(path: Path, fd: int) -> Header:
    """The header of an open file.

    Raises:
        FileFormatError: it isn't one.
    """
    head = io.BytesIO(os.pread(fd, _MAX_HEADER_BYTES, 0))
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(head)
        if version not in readers:
            raise ValueError(f"format version {version}")
        shape, fortran, dtype = readers[version](head)
    except Exception as error:  # NumPy's parser lets many kinds through: TokenError, RecursionError, TypeError, ...
        raise FileFormatError(f"{path} isn't a readable .npy file: {error}; write it with np.save") from error
    return Header(shape, fortran, dtype, head.tell())


def header_bytes(shape: tuple[int, int], dtype: DType) -> bytes:
    """A version 1.0 header of 128 bytes for any number of rows, so that it can be written again at the end."""
    fields = f"{{'descr': '{dtype.carrier.str}', 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


class NpySource(FileSource):
    """The rows of a .npy file. Fortran order and foreign byte order are converted while they are read."""

    path: Path

    def conversion(self, dtype: DType) -> str:
        if not dtype.in_numpy:
            return f"no .npy file can hold {dtype}; convert the weights, or pass a torch tensor"
        return f"convert the file, for example {_saved_again(self.path, dtype.name)}"


def open_source(value: Any, request: SourceRequest) -> Source:
    """The source of the .npy file at a path.

    Raises:
        FileNotFoundError, PermissionError: from opening it.
        FileFormatError: not a .npy file, object elements, or its size isn't what the header says.
        InputError, ShapeError, DTypeError
    """
    path = Path(value)
    fd = open_regular(path, "a .npy file")
    try:
        return _source(fd, path, request)
    except BaseException:
        os.close(fd)
        raise


def _source(fd: int, path: Path, request: SourceRequest) -> NpySource:
    header = read_header(path, fd)
    dtype = header.dtype
    if dtype.hasobject:
        raise FileFormatError(
            f"{path} holds Python objects, expected floating-point numbers; convert and save it again"
        )
    converted = f"convert the file, for example {_saved_again(path, 'float32')}"
    element = parse_dtype(dtype.newbyteorder("="), f"the element type of {path}", converted)
    request.check_rows(header.shape, f"the array in {path}", _saved_again(path, request.in_features))
    rows, features = header.shape
    expected = header.length + rows * features * dtype.itemsize
    promise = f"its header promises {expected} for shape {header.shape}"
    check_size(fd, path, expected, promise, "copy or save it again")
    itemsize = dtype.itemsize
    strides = (itemsize, rows * itemsize) if header.fortran else (features * itemsize, itemsize)
    layout = FileLayout(fd, path, header.length, strides, features, itemsize, swapped=not dtype.isnative)
    kind = ".npy file in Fortran order" if header.fortran else ".npy file"
    return NpySource(kind, layout, (rows, features), element, path)


def _saved_again(path: Path, change: str | int) -> str:
    """What saves a file's array with another element type, or with so many features a row."""
    change = f"astype('{change}')" if isinstance(change, str) else f"reshape(-1, {change})"
    return f"np.save('new.npy', np.load('{path}').{change})"


def open_sink(out: Any, request: SinkRequest) -> Sink:
    """The sink that writes a new .npy file at a path.

    Raises:
        DTypeError: the format has no such element type.
        OutputError, OutputExistsError: no file may be made there.
    """
    dtype, features = request.dtype, request.out_features
    if not dtype.in_numpy:
        raise DTypeError(f"a .npy file can't hold {dtype}; pass out_dtype='float32' or out_dtype='float16'")
    path = check_path(os.fspath(out), request)
    return AtomicFileSink(path, request, lambda rows: header_bytes((rows, features), dtype))
