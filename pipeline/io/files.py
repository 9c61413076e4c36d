"""Rows that lie in files, read with preadv and written with pwrite: no page of them is mapped.

That goes for np.memmap arrays too, through a descriptor of our own of the file behind them (`open_map`). Storing
through a map ends the process (SIGBUS) where the disk is full or the file was cut, and pages that are read through one
count as the process's memory. Both ways meet in the system's page cache: what one writes, the other reads.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.arrays import HostArray, address_of, convert
from pipeline.config import GIB
from pipeline.dtypes import Cast, DType, cast_between
from pipeline.errors import FileFormatError, OutputError
from pipeline.flow import Chunk, Feed, Gather, PlainRows, Sink, Source, SourceRows, TargetRows
from pipeline.io.memory import RangeFeed


@dataclass(frozen=True)
class FileLayout:
    """Where rows lie in an open file: the position of their first element, the bytes from one row to the next and from
    one column to the next. `plain` where each row follows the one before, in native byte order."""

    fd: int
    path: Path
    position: int
    strides: tuple[int, int]
    itemsize: int  # bytes of an element
    swapped: bool = False
    plain: bool = True
    reads: bool = True  # whether rows are read, not written: what messages say

    @classmethod
    def in_order(
        cls, fd: int, path: Path, position: int, features: int, itemsize: int, *, reads: bool = True
    ) -> FileLayout:
        return cls(fd, path, position, (features * itemsize, itemsize), itemsize, reads=reads)

    @classmethod
    def like(cls, fd: int, path: Path, position: int, array: HostArray, *, reads: bool = True) -> FileLayout:
        """As the elements of `array` lie in memory."""
        plain = array.shape[1] * array.itemsize, array.itemsize
        row, column = (a if n > 1 else b for n, a, b in zip(array.shape, array.strides, plain, strict=True))
        swapped = not array.dtype.isnative
        return cls(
            fd, path, position, (row, column), array.itemsize, swapped, not swapped and (row, column) == plain, reads
        )

    @property
    def by_columns(self) -> bool:
        """Whether it is the elements of a column, not those of a row, that follow one another."""
        return self.strides[1] != self.itemsize

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
        return PlainRows(self._position(0), layout.strides[0], layout.fd, self._cast)

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
        code = errno.EIO if code == -1 else code  # -1: nothing was written, and nothing said why
        error = OSError(code, os.strerror(code), str(path))
        return error if reads else disk_error(error, path)


def disk_error(error: OSError, path: Path) -> OutputError:
    return OutputError(f"writing {path} failed: {error.strerror}; free space or choose another path")


def _bytes(array: HostArray) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


class FileSource(Source):
    """Rows of an open file, which it closes. `array` is the map of them that the caller passed, if that is one."""

    where = "file"

    def __init__(
        self, kind: str, layout: FileLayout, shape: tuple[int, int], dtype: DType, array: HostArray | None = None
    ) -> None:
        self.kind, self.layout, self.dtype, self.array = kind, layout, dtype, array
        self.rows, self.features = shape
        self._fd = layout.fd

    def feed(self, chunk_rows: int, gather: Gather, wire: DType) -> Feed:
        cast = cast_between(self.dtype, wire)
        return RangeFeed(self.rows or 0, chunk_rows, lambda row, n: FileRows(self.layout, row, cast))

    @property
    def span(self) -> tuple[int, int]:
        """The positions in the file of the first byte and the one after the last."""
        (row, column), first = self.layout.strides, self.layout.position
        last = first + ((self.rows or 0) - 1) * row + (self.features - 1) * column
        return first, last + self.dtype.itemsize

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class MapSink(Sink):
    """The file behind a writable np.memmap of the caller's, who finds the rows in the map."""

    where = "file"

    def __init__(self, value: Any, layout: FileLayout, cast: Cast | None) -> None:
        self._value, self._layout, self._cast, self._fd = value, layout, cast, layout.fd

    def target(self, chunk: Chunk) -> FileRows:
        return FileRows(self._layout, chunk.row, self._cast)

    def finish(self, rows: int) -> Any:
        self.abort()
        return self._value

    def abort(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def reserve(fd: int, path: Path, position: int, n_bytes: int) -> None:
    """Take a file's disk space now, so that a full disk shows before any work. What the file holds stays.

    Raises:
        OutputError: there isn't as much.
    """
    try:
        os.posix_fallocate(fd, position, n_bytes)
    except OSError as error:
        raise OutputError(
            f"can't reserve {n_bytes / GIB:.2f} GiB for {path}: {error.strerror}; free space or choose another path"
        ) from error


# -- what is behind a map ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MappedFile:
    """The open file behind an array, and the positions in it of the array's first byte and the one after its last."""

    fd: int
    path: Path
    low: int
    high: int

    def layout(self, array: HostArray, *, reads: bool = True) -> FileLayout:
        """Where the array's rows lie in it; `reads`: to be read, not written."""
        first = self.low + address_of(array) - np.lib.array_utils.byte_bounds(array)[0]
        return FileLayout.like(self.fd, self.path, first, array, reads=reads)


def memmap_of(array: HostArray) -> np.memmap[Any, Any] | None:
    """The np.memmap that an array is or is a view of; None for other memory."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and not isinstance(owner.base, mmap.mmap):
        owner = owner.base
    return owner if isinstance(owner, np.memmap) else None


def open_map(array: HostArray, flags: int = os.O_RDONLY) -> MappedFile | None:
    """Open the file behind a view of an np.memmap, whatever its name has become; None where it isn't found.

    The map itself holds a descriptor of its file. The one that has the map's inode is opened again, and is the right
    one if a page mapped from it shows the same device and inode in the system's list.
    """
    low, high = np.lib.array_utils.byte_bounds(array)
    mapped = _mapped_at(low)
    if mapped is None:
        return None
    file, position = mapped
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
            if not stat.S_ISREG(status.st_mode) or str(status.st_ino) != file[1]:
                continue
            path = Path(os.readlink(f"/proc/self/fd/{name}"))
            fd = os.open(f"/proc/self/fd/{name}", flags | os.O_CLOEXEC)
        except OSError:  # another thread has closed it, or it may not be opened so
            continue
        if _is_file(fd, file):
            return MappedFile(fd, path, position, position + high - low)
        os.close(fd)
    return None


def _is_file(fd: int, file: tuple[str, str]) -> bool:
    """NOTE: fstat's device isn't the one of the list on Btrfs and overlay file systems. A map of it gives the same."""
    try:
        with mmap.mmap(fd, 1, prot=mmap.PROT_READ) as page:
            page_bytes = np.frombuffer(page, np.uint8)
            mapped = _mapped_at(address_of(page_bytes))
            del page_bytes  # which the map can't be closed before
    except (OSError, ValueError):
        return False
    return mapped is not None and mapped[0] == file


def _mapped_at(address: int) -> tuple[tuple[str, str], int] | None:
    """The file that is mapped at an address, as device and inode, and the position there. Format: proc(5)."""
    try:
        with open("/proc/self/maps") as lines:
            for line in lines:
                span, _, offset, device, inode = line.split(maxsplit=5)[:5]
                first, end = (int(bound, 16) for bound in span.split("-"))
                if first <= address < end:
                    return (device, inode), int(offset, 16) + address - first
    except OSError:
        pass
    return None
