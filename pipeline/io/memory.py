"""Rows in the host's memory, and chunks of sources whose rows can be read in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipeline.arrays import HostArray, address_of, convert
from pipeline.dtypes import Cast
from pipeline.flow import Chunk, DeviceRows, Feed, PlainRows, SourceRows, TargetRows


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


class RangeFeed(Feed):
    """Chunks of a source whose rows can be read in any order.

    NOTE: shorter chunks at both ends would gain nothing. Rows come back behind those that go out by the longest chunk's
    copy and kernel, whatever the other chunks' lengths.
    """

    def __init__(self, rows: int, chunk_rows: int, part: Callable[[int, int], SourceRows | DeviceRows]) -> None:
        self._rows, self._chunk_rows, self._part = rows, chunk_rows, part
        self._lock = threading.Lock()
        self._next = 0
        self._count = -(-rows // chunk_rows)

    def take(self) -> Chunk | None:
        with self._lock:
            if self._next >= self._count:
                return None
            index = self._next
            self._next += 1
        row = index * self._chunk_rows
        rows = min(self._chunk_rows, self._rows - row)
        return Chunk(index, row, rows, self._part(row, rows))

    @property
    def exhausted(self) -> bool:
        return self._next >= self._count

    def stop(self) -> None:
        self._next = self._count
