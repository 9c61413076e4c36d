"""Rows in the host's memory, and chunks of sources whose rows can be read in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipeline.arrays import HostArray
from pipeline.flow import Chunk, DeviceRows, Feed, SourceRows
from pipeline.staging.jobs import Cast, CopyJob, Job


class ArrayRows:
    """Rows of an array of any strides and byte order."""

    def __init__(self, array: HostArray, cast: Cast | None = None) -> None:
        self._array, self._cast = array, cast
        self.array = _in_place(array, cast)

    def fill(self, first: int, piece: HostArray) -> Job:
        return CopyJob(piece, self._array[first : first + len(piece)], self._cast)


class ArrayTarget:
    """Rows of an array of any strides and byte order; `fresh` where its memory has never been written.

    Streaming stores: nobody reads the result before the run is over, and pieces stay in the cache.
    """

    def __init__(self, array: HostArray, cast: Cast | None = None, *, fresh: bool = False) -> None:
        self._array, self._cast, self._fresh = array, cast, fresh
        self.array = _in_place(array, cast)

    def drain(self, first: int, piece: HostArray) -> Job:
        return CopyJob(self._array[first : first + len(piece)], piece, self._cast, streaming=True, fresh=self._fresh)


def _in_place(array: HostArray, cast: Cast | None) -> HostArray | None:
    return array if cast is None and array.flags.c_contiguous and array.dtype.isnative else None


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
