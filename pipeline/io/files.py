"""Rows that lie in files, read with preadv and written with pwrite.

Files in memory are written through a map by copy workers in C (csrc/host/file_bytes.h), without any page of it being
touched here: a store would end the process (SIGBUS) if somebody had cut the file.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.arrays import HostArray, address_of, convert
from pipeline.dtypes import Cast, DType, cast_between
from pipeline.errors import FileFormatError, InputError, OutputError
from pipeline.flow import Source, Span
from pipeline.io.reservation import cut_error, is_in_memory
from pipeline.rows import PlainRows, SourceRows, TargetRows


@dataclass(frozen=True)
class FileLayout:
    """Where rows lie in an open file.

    Args:
        position: of the first element.
        strides: bytes from one row to the next, and from one column to the next.
        features: elements of a row.
        itemsize: bytes of an element.
        swapped: elements are of foreign byte order.
        reads: rows are read, not written; messages say so.
        map: of the file's bytes, for copy workers in C to write through. Who holds the layout keeps it mapped.
    """

    fd: int
    path: Path
    position: int
    strides: tuple[int, int]
    features: int
    itemsize: int
    swapped: bool = False
    reads: bool = True
    map: HostArray | None = field(default=None, compare=False, repr=False)

    @classmethod
    def in_order(
        cls,
        fd: int,
        path: Path,
        position: int,
        features: int,
        itemsize: int,
        *,
        swapped: bool = False,
        reads: bool = True,
    ) -> FileLayout:
        """Each row follows the one before."""
        return cls(fd, path, position, (features * itemsize, itemsize), features, itemsize, swapped, reads)

    @classmethod
    def like(cls, fd: int, path: Path, position: int, array: HostArray, *, reads: bool = True) -> FileLayout:
        """As the elements of `array` lie in memory."""
        features, itemsize = array.shape[1], array.itemsize
        in_order = features * itemsize, itemsize
        row, column = (a if n > 1 else b for n, a, b in zip(array.shape, array.strides, in_order, strict=True))
        return cls(fd, path, position, (row, column), features, itemsize, not array.dtype.isnative, reads)

    @property
    def plain(self) -> bool:
        """Whether each row follows the one before, in native byte order."""
        return not self.swapped and self.strides == (self.features * self.itemsize, self.itemsize)

    @property
    def by_columns(self) -> bool:
        """Whether it is the elements of a column, not those of a row, that follow one another."""
        return self.strides[1] != self.itemsize

    def mapped(self, end: int) -> FileLayout:
        """The same with a map of the bytes before `end`, which the file has, where it pays: in memory."""
        if not self.plain or not end or not is_in_memory(self.fd):
            return self
        try:
            whole = mmap.mmap(self.fd, end)
        except (OSError, ValueError):  # a limit on address space, or a file that was cut: pwrite needs no map
            return self
        return replace(self, map=np.frombuffer(whole, np.uint8))

    def unmapped(self) -> FileLayout:
        """The same without its map, which ends when no rows that are still written hold it either."""
        return replace(self, map=None)

    def lines(self, array: HostArray, position: int) -> Iterator[tuple[memoryview, int]]:
        """What is contiguous at both ends, and its position in the file: `array` holds the file's rows or columns."""
        whole = _bytes(array)
        if self.strides == (array.shape[1] * self.itemsize, self.itemsize):
            yield whole, position
            return
        length = array.shape[1] * self.itemsize
        for i in range(len(array)):
            yield whole[i * length : (i + 1) * length], position + i * self.strides[self.by_columns]


def has_lines(array: HostArray) -> bool:
    """Whether its rows, or its columns, are contiguous."""
    return any(n == 1 or stride == array.itemsize for n, stride in zip(array.shape, array.strides, strict=True))


class FileRows(SourceRows, TargetRows):
    """Rows of a file, from `row` on, read with preadv and written with pwrite."""

    def __init__(self, layout: FileLayout, row: int, cast: Cast | None) -> None:
        self._layout, self._row, self._cast = layout, row, cast

    @property
    def plain(self) -> PlainRows | None:
        layout = self._layout
        if not layout.plain:
            return None
        map_address = None if layout.map is None else address_of(layout.map)
        return PlainRows(self._position(0), layout.strides[0], layout.fd, self._cast, map_address=map_address)

    def _position(self, first: int) -> int:
        return self._layout.position + (self._row + first) * self._layout.strides[0]

    def read(self, first: int, piece: HostArray) -> None:
        layout, position, end = self._layout, self._position(first), first + len(piece)
        if layout.plain and self._cast is None:
            self._read(_bytes(piece), position, end)
            return
        dtype = piece.dtype if self._cast is None else self._cast.source.carrier
        shape = piece.shape[::-1] if layout.by_columns else piece.shape
        into = np.empty(shape, dtype.newbyteorder() if layout.swapped else dtype)
        for line, at in layout.lines(into, position):
            self._read(line, at, end)
        convert(piece, into.T if layout.by_columns else into, self._cast)

    def _read(self, buffer: memoryview, position: int, end: int) -> None:
        while buffer:
            got = os.preadv(self._layout.fd, [buffer], position)
            if got == 0:
                raise self.failure(-1, position, end)
            buffer, position = buffer[got:], position + got

    def write(self, first: int, piece: HostArray) -> None:
        layout, rows = self._layout, piece
        if self._cast is not None:
            rows = np.empty(piece.shape, self._cast.target.carrier)
            convert(rows, piece, self._cast)
        if layout.swapped:
            rows = rows.byteswap()
        rows = np.ascontiguousarray(rows.T if layout.by_columns else rows)
        for line, at in layout.lines(rows, self._position(first)):
            self._write(line, at)

    def _write(self, buffer: memoryview, position: int) -> None:
        while buffer:
            try:
                written = os.pwrite(self._layout.fd, buffer, position)
            except OSError as error:
                raise disk_error(error, self._layout.path) from error
            buffer, position = buffer[written:], position + written

    def failure(self, code: int, position: int, end: int) -> Exception:
        path, reads = self._layout.path, self._layout.reads
        if reads and code == -1:
            early = f", {self._position(end) - position} bytes early" if self._layout.plain else ""
            return FileFormatError(f"{path} ended at byte {position}{early}: it was cut while it was read")
        if not reads and code == errno.EFAULT:  # through the map: the system has no page for this position
            size = os.fstat(self._layout.fd).st_size
            if position >= size:
                return cut_error(path, size, self._position(end))
            code = errno.ENOSPC
        code = errno.EIO if code == -1 else code  # -1: nothing was written, and nothing said why
        error = OSError(code, os.strerror(code), str(path))
        return error if reads else disk_error(error, path)


def disk_error(error: OSError, path: Path) -> OutputError:
    return OutputError(f"writing {path} failed: {error.strerror}; free space or choose another path")


def _bytes(array: HostArray) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


class FileSource(Source):
    """Rows of an open file, which it closes. `path` is where it was opened, if it was given as a path."""

    where = "file"

    def __init__(
        self, kind: str, layout: FileLayout, shape: tuple[int, int], dtype: DType, path: Path | None = None
    ) -> None:
        self.kind, self.dtype, self.path, self._layout = kind, dtype, path, layout
        self.rows: int = shape[0]
        self.features = shape[1]
        self._open_fd = layout.fd

    def rows_at(self, row: int, count: int, wire: DType) -> FileRows:
        return FileRows(self._layout, row, cast_between(self.dtype, wire))

    def spans(self) -> tuple[Span, ...]:
        (row, column), first = self._layout.strides, self._layout.position
        last = first + (self.rows - 1) * row + (self.features - 1) * column
        return (Span(first, last + self.dtype.itemsize, file_id(self._layout.fd)),)

    def close(self) -> None:
        if self._open_fd >= 0:
            os.close(self._open_fd)
            self._open_fd = -1


def file_id(fd: int) -> tuple[int, int]:
    """The device and inode number of an open file: which file it is, whatever its name."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def open_regular(path: Path, expected: str) -> int:
    """Open a file for reading. Returns its descriptor.

    Raises:
        InputError: something else than a file, where a message says what was `expected`.
        FileNotFoundError, PermissionError: from opening it.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: that would wait for a pipe's writer
        raise InputError(f"source {str(path)!r} isn't a regular file, expected {expected}")
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def check_size(fd: int, path: Path, expected: int, promise: str, remedy: str) -> None:
    """Check the bytes of an open file; `promise` is who says how many there should be.

    Raises:
        FileFormatError: it has more or fewer.
    """
    size = os.fstat(fd).st_size
    if size != expected:
        state = "truncated" if size < expected else "followed by other data"
        raise FileFormatError(f"{path} is {state}: {size} bytes, {promise}; {remedy}")
