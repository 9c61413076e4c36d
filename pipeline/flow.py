"""The words that sources, sinks and the executor share: rows on the host, chunks, feeds.

A `Source` knows its element type and width before any row is read. Its feed hands out chunks to one or several
executors; a chunk's rows are then read from any thread. A `Sink` takes each row once, in any order, from any thread.

Rows cross the bus in the wire's element type, which may be narrower than the source's or the result's: the jobs that
fill and drain pieces cast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.arrays import HostArray
from pipeline.dtypes import DType
from pipeline.staging.jobs import Job


class Operation(Protocol):
    """Something queued: a copy, a kernel, a worker's job."""

    def done(self) -> bool:
        """Whether it has completed. Raises what the operation itself raised."""

    def times(self) -> tuple[float, float]:
        """Start and end in seconds on the device's clock; only once it is done."""


class Workers(Protocol):
    """Threads that copy rows between the caller's memory or files and pinned pieces."""

    @property
    def description(self) -> str:
        """How many there are and what they are made of, for reports."""

    def submit(self, work: Callable[[], None]) -> Operation:
        """Queue `work`; jobs may run at the same time and finish in any order."""

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` now and wait for it. Raises what it raises."""

    def wait_all(self) -> None:
        """Wait until every job that was submitted is done; what they raise is left to their operations."""

    def close(self) -> None:
        """Wait for the jobs and end the threads."""


@dataclass(frozen=True)
class DeviceRows:
    """Rows in a device's memory already: first address and row stride in elements. `owner` keeps them alive."""

    ordinal: int
    address: int
    stride: int
    rows: int
    owner: Any

    def part(self, first: int, rows: int, itemsize: int) -> DeviceRows:
        return DeviceRows(self.ordinal, self.address + first * self.stride * itemsize, self.stride, rows, self.owner)


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
