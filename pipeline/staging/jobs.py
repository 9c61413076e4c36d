"""What copy workers do: copies with or without a cast, reads and writes of files.

Calling a job does it, with NumPy and the system's calls, in the calling thread. That is how it is done where the
native workers (native.py) can't take it over, and what they must do as well.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.arrays import HostArray, narrow_bfloat16, widen_bfloat16
from pipeline.dtypes import BFLOAT16, DType
from pipeline.errors import FileFormatError, OutputError

Job = Callable[[], None]


class Cast(NamedTuple):
    """A change of element type, rounded to nearest even; NaN stays NaN."""

    source: DType
    target: DType


def cast_between(source: DType, target: DType) -> Cast | None:
    return None if source is target else Cast(source, target)


def convert(target: HostArray, source: HostArray, cast: Cast | None) -> None:
    """target[...] = source, both in the carrier types of the cast."""
    if cast is not None and cast.target is BFLOAT16:
        source = narrow_bfloat16(source)
    elif cast is not None and cast.source is BFLOAT16:
        source = widen_bfloat16(source)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond fp16's range lies infinity
        np.copyto(target, source, casting="same_kind")


@dataclass(slots=True)
class CopyJob:
    """target[...] = source: rows of any strides, carrier types of `cast`. `streaming` stores bypass the caches; the
    memory of a `fresh` target has never been written."""

    target: HostArray
    source: HostArray
    cast: Cast | None = None
    streaming: bool = False
    fresh: bool = False

    def __call__(self) -> None:
        convert(self.target, self.source, self.cast)


@dataclass(slots=True)
class ReadJob:
    """Rows from a file's byte `position` on, read with preadv: no page is mapped.

    Each row follows the one before, unless `strides` says how many bytes lie between rows and between columns, one of
    which is an element's size. `swapped`: the file's elements are of foreign byte order.
    """

    target: HostArray
    fd: int
    position: int
    path: Path
    cast: Cast | None = None
    strides: tuple[int, int] | None = None
    swapped: bool = False

    def __call__(self) -> None:
        if self.cast is None and self.strides is None and not self.swapped:
            self._read(_bytes(self.target), self.position)
            return
        dtype = self.target.dtype if self.cast is None else self.cast.source.carrier
        columns = _is_by_columns(self.strides, dtype.itemsize)
        shape = self.target.shape[::-1] if columns else self.target.shape
        into = np.empty(shape, dtype.newbyteorder() if self.swapped else dtype)
        for line, position in _lines(into, self.position, self.strides, columns):
            self._read(line, position)
        convert(self.target, into.T if columns else into, self.cast)

    def _read(self, buffer: memoryview, position: int) -> None:
        while buffer:
            got = os.preadv(self.fd, [buffer], position)
            if got == 0:
                raise self.failure(-1, position)
            buffer, position = buffer[got:], position + got

    def failure(self, code: int, position: int) -> Exception:
        """The exception of a read that failed at `position` with an errno, or -1 for the file's end."""
        if code == -1:
            early = ""
            if self.strides is None:
                end = self.position + _file_bytes(self.target, self.cast and self.cast.source)
                early = f", {end - position} bytes early"
            return FileFormatError(f"{self.path} ended at byte {position}{early}: it was cut while it was read")
        return OSError(code, os.strerror(code), str(self.path))


@dataclass(slots=True)
class WriteJob:
    """Rows to a file from byte `position` on, written with pwrite. `strides` and `swapped` as in `ReadJob`."""

    source: HostArray
    fd: int
    position: int
    path: Path
    cast: Cast | None = None
    strides: tuple[int, int] | None = None
    swapped: bool = False

    def __call__(self) -> None:
        rows = self.source
        if self.cast is not None:
            rows = np.empty(self.source.shape, self.cast.target.carrier)
            convert(rows, self.source, self.cast)
        if self.swapped:
            rows = rows.byteswap()
        columns = _is_by_columns(self.strides, rows.itemsize)
        rows = np.ascontiguousarray(rows.T if columns else rows)
        for line, position in _lines(rows, self.position, self.strides, columns):
            self._write(line, position)

    def _write(self, buffer: memoryview, position: int) -> None:
        while buffer:
            try:
                written = os.pwrite(self.fd, buffer, position)
            except OSError as error:
                raise self.failure(error.errno or errno.EIO, position) from error
            buffer, position = buffer[written:], position + written

    def failure(self, code: int, position: int) -> Exception:
        """The exception of a write that failed with an errno, or -1 where nothing was written and nothing said why."""
        code = errno.EIO if code == -1 else code
        return disk_error(OSError(code, os.strerror(code)), self.path)


def disk_error(error: OSError, path: Path) -> OutputError:
    return OutputError(f"writing {path} failed: {error.strerror}; free space or choose another path")


def _bytes(array: HostArray) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _is_by_columns(strides: tuple[int, int] | None, itemsize: int) -> bool:
    """Whether it is the elements of a column, not those of a row, that follow one another."""
    return strides is not None and strides[1] != itemsize


def _lines(
    array: HostArray, position: int, strides: tuple[int, int] | None, columns: bool
) -> Iterator[tuple[memoryview, int]]:
    """What is contiguous at both ends, and its position in the file: `array` holds the file's rows or columns."""
    whole = _bytes(array)
    if strides is None:
        yield whole, position
        return
    length = array.shape[1] * array.itemsize
    for i in range(len(array)):
        yield whole[i * length : (i + 1) * length], position + i * strides[columns]


def _file_bytes(rows: HostArray, dtype: DType | None) -> int:
    return rows.nbytes if dtype is None else rows.size * dtype.itemsize
