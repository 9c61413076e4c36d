"""The words that sources, sinks and the executor share: rows on the host, chunks, feeds.

A `Source` knows its element type and width before any row is read. Its feed hands out chunks to one or several
executors; a chunk's rows are then read from any thread. A `Sink` takes each row once, in any order, from any thread.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.arrays import HostArray
from pipeline.config import DType
from pipeline.devices.base import DeviceRows


class SourceRows(Protocol):
    """Some consecutive rows on the host."""

    array: HostArray | None
    """The rows as they lie in memory, where they are contiguous and native-endian."""

    def read(self, first: int, out: HostArray) -> None:
        """Copy rows [first, first + len(out)) to `out`. May be called from several threads."""


class TargetRows(Protocol):
    """Where a chunk's rows go on the host."""

    array: HostArray | None
    """The memory itself, where it is contiguous and native-endian."""

    def write(self, first: int, rows: HostArray) -> None:
        """Store `rows` at rows [first, first + len(rows)) of the chunk. May be called from several threads."""


class ArrayRows:
    """Rows of an array of any strides and byte order."""

    def __init__(self, array: HostArray) -> None:
        self._array = array
        self.array = array if array.flags.c_contiguous and array.dtype.isnative else None

    def read(self, first: int, out: HostArray) -> None:
        np.copyto(out, self._array[first : first + len(out)])


class ArrayTarget:
    """Rows of an array of any strides and byte order."""

    def __init__(self, array: HostArray) -> None:
        self._array = array
        self.array = array if array.flags.c_contiguous and array.dtype.isnative else None

    def write(self, first: int, rows: HostArray) -> None:
        np.copyto(self._array[first : first + len(rows)], rows)


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


class RangeFeed(Feed):
    """Chunks of a source whose rows can be read in any order."""

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
    def feed(self, chunk_rows: int, buffers: Callable[[int], HostArray], depth: int) -> Feed:
        """The chunks. Sources that gather rows themselves take up to `depth` pinned chunk buffers from `buffers`."""

    def close(self) -> None:
        """Release files."""


class Sink(ABC):
    """Takes the result's rows, chunk by chunk, in any order."""

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
