"""The words that sources, sinks and the executor share: rows on the host, chunks, feeds.

A `Source` knows its element type and width before any row is read. Its feed hands out chunks to one or several
executors; a chunk's rows are then read from any thread. A `Sink` takes each row once, in any order, from any thread.

Rows cross the bus in the wire's element type, which may be narrower than the source's or the result's: the jobs that
fill and drain pieces cast.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.arrays import HostArray
from pipeline.config import DType
from pipeline.devices.base import DeviceRows
from pipeline.io.jobs import Cast, CopyJob, Job


class SourceRows(Protocol):
    """Some consecutive rows on the host."""

    array: HostArray | None
    """The rows as they lie in memory, where they are contiguous, native-endian and of the wire's type."""

    def fill(self, first: int, piece: HostArray) -> Job:
        """The job that copies rows [first, first + len(piece)) to `piece`, which is of the wire's type."""


class TargetRows(Protocol):
    """Where a chunk's rows go on the host."""

    array: HostArray | None
    """The memory itself, where it is contiguous, native-endian and of the wire's type."""

    def drain(self, first: int, piece: HostArray) -> Job:
        """The job that stores `piece` at rows [first, first + len(piece)) of the chunk."""


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


@dataclass(eq=False)
class BatchResult:
    """The result of one batch of a stream, and how many of its rows are still missing."""

    array: HostArray
    missing: int


@dataclass
class Chunk:
    """The rows that one kernel launch computes: [row, row + rows) of the dataset."""

    index: int
    row: int
    rows: int
    source: SourceRows | DeviceRows
    release: Callable[[], None] | None = None  # called once the source's memory isn't read any more
    filled: tuple[float, float] | None = None  # when the rows were gathered, if that has happened already
    batch: BatchResult | None = None  # streams: the batch it belongs to, at row `batch_row` of it
    batch_row: int = 0


class Feed(ABC):
    """Hands out a source's chunks in order; may be shared by several executors."""

    @abstractmethod
    def take(self) -> Chunk | None:
        """The next chunk, or None where there is none yet or none any more (see `exhausted`)."""

    @property
    @abstractmethod
    def exhausted(self) -> bool:
        """Whether every chunk has been handed out."""

    @abstractmethod
    def stop(self) -> None:
        """Hand out nothing more, and end what reads ahead."""


@dataclass(frozen=True)
class Gather:
    """What a source needs that gathers rows itself: pinned chunk buffers, at most `depth` of them, and who copies."""

    buffers: Callable[[int], HostArray]
    depth: int
    copy: Callable[[Job], None]


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


class Source(ABC):
    """Rows of one element type and width."""

    rows: int | None  # None where only the end will tell
    features: int
    dtype: DType
    kind: str  # for messages and reports
    family: str = "numpy"  # what a new result should be: "numpy", "torch" or "cuda"
    path: Path | None = None  # the file it was opened from, if it was given as a path

    @abstractmethod
    def feed(self, chunk_rows: int, gather: Gather, wire: DType) -> Feed:
        """The chunks, as rows of the wire's type. Sources that gather rows themselves do it into chunk buffers."""

    def close(self) -> None:
        """Release files."""


class Sink(ABC):
    """Takes the result's rows, chunk by chunk, in any order."""

    where = "memory"  # that rows go to: "memory", "fresh memory" or "file"

    @abstractmethod
    def target(self, chunk: Chunk) -> TargetRows | DeviceRows:
        """Where the chunk's rows go."""

    def stop(self) -> None:
        """The run takes in nothing more: nobody needs to wait for room."""

    def commit(self, chunk: Chunk) -> None:
        """Every row of the chunk has been written. Called once a chunk, from the thread of the device that ran it."""

    @abstractmethod
    def finish(self, rows: int) -> Any:
        """The result, complete with `rows` rows."""

    def abort(self) -> None:
        """The run failed: remove what it made."""
