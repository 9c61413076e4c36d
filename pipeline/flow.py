"""The words that cross walls: chunks of rows, feeds, sources and sinks.

A `Source` knows its element type and width before any row is read. Its feed hands out chunks to one or several
executors; a chunk's rows are then read from any thread. A `Sink` takes each row once, in any order, from any thread.
Both say what they are by attributes: nobody asks for their class.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.arrays import HostArray, convert, overlaps
from pipeline.dtypes import Cast, DType, cast_between
from pipeline.errors import PipelineError
from pipeline.rows import DeviceRows, Fill, SourceRows, TargetRows


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
    """Hands out a source's chunks in order; may be shared by several executors.

    Chunk `index` is rows [index * chunk_rows, (index + 1) * chunk_rows) of the dataset, whatever was skipped before it;
    in a stream, where a chunk ends with its batch at the latest, nothing is skipped. A chunk with fewer rows is the
    last one, or an error in the source cut it short.
    """

    skipped_rows: int = 0
    """The rows of the chunks passed over so far: what the feed was told to skip."""

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
    """Chunks of a source whose rows can be read in any order, without those whose index is in `skip`.

    NOTE: shorter chunks at both ends would gain nothing. Rows come back behind those that go out by the longest chunk's
    copy and kernel, whatever the other chunks' lengths.
    """

    def __init__(
        self,
        rows: int,
        chunk_rows: int,
        part: Callable[[int, int], SourceRows | DeviceRows],
        skip: AbstractSet[int] = frozenset(),
    ) -> None:
        self._rows, self._chunk_rows, self._part, self._skip = rows, chunk_rows, part, skip
        self._lock = threading.Lock()
        self._count = -(-rows // chunk_rows)
        self._next = self._following(0)

    def _following(self, index: int) -> int:
        """The first chunk from `index` on that isn't skipped."""
        while index in self._skip and index < self._count:
            self.skipped_rows += self._length(index)
            index += 1
        return index

    def _length(self, index: int) -> int:
        return min(self._chunk_rows, self._rows - index * self._chunk_rows)

    def take(self) -> Chunk | None:
        with self._lock:
            index = self._next
            if index >= self._count:
                return None
            self._next = self._following(index + 1)
        row, rows = index * self._chunk_rows, self._length(index)
        return Chunk(index, row, rows, self._part(row, rows))

    @property
    def exhausted(self) -> bool:
        return self._next >= self._count

    def stop(self) -> None:
        with self._lock:
            self._next = self._count


@dataclass(frozen=True)
class Gather:
    """What a source needs that gathers rows itself: pinned chunk buffers, at most `depth` of them, and who copies."""

    buffers: Callable[[int], HostArray]
    depth: int
    copy: Callable[[Fill], None]


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [low, high) of memory, or of the file with this device and inode number."""

    low: int
    high: int
    file: tuple[int, int] | None = None

    @classmethod
    def of_array(cls, array: HostArray) -> Span:
        return cls(*np.lib.array_utils.byte_bounds(array))

    def overlaps(self, other: Span) -> bool:
        return self.file == other.file and overlaps((self.low, self.high), (other.low, other.high))


class Source(ABC):
    """Rows of one element type and width.

    A source from outside sets the first four attributes and defines `read`; everything else has a default. One whose
    rows can be moved without Python defines `rows_at` instead, one that gets its rows in order only defines `feed`.
    """

    rows: int | None  # None where only the end will tell
    features: int
    dtype: DType  # or the name of one, until the source is opened
    kind: str  # for messages and reports
    where: str = "memory"  # where rows come from: "memory", "file", "batches" or "device"
    family: str = "numpy"  # what a new result should be: "numpy", "torch" or "cuda"
    gathers: bool = False  # it gets its rows in order and gathers them in chunk buffers; others are read in any order
    path: Path | None = None  # the file it was opened from, if it was given as a path
    tensor: Any = None  # the CUDA tensor that rows are read from by the kernel itself
    memory: HostArray | None = None  # contiguous memory that all its rows lie in, if they do

    def read(self, first: int, piece: HostArray) -> None:
        """Copy rows [first, first + len(piece)) to `piece`, contiguous rows of the source's own element type (as its
        carrier). Called from any thread, for several pieces at once. `piece` is only valid during the call."""
        raise NotImplementedError(f"{type(self).__name__} defines none of read, rows_at and feed; define one")

    def rows_at(self, row: int, count: int, wire: DType) -> SourceRows | DeviceRows:
        """Rows [row, row + count), to be read in the wire's element type."""
        return _RowsRead(self, row, cast_between(self.dtype, wire))

    def feed(self, chunk_rows: int, gather: Gather, wire: DType, skip: AbstractSet[int] = frozenset()) -> Feed:
        """The chunks of `chunk_rows` rows without those whose index is in `skip`, as rows of the wire's element type.
        Reads nothing yet."""
        if self.rows is None:
            raise PipelineError(f"the source ({self.kind}) doesn't know its number of rows, so it must define feed()")
        return RangeFeed(self.rows, chunk_rows, lambda row, n: self.rows_at(row, n, wire), skip)

    def spans(self) -> tuple[Span, ...]:
        """What its rows take up in memory and in files: where no result may go."""
        return ()

    def conversion(self, dtype: DType) -> str:
        """How its rows become ones of another element type, for messages; "" for what is said of arrays."""
        return ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the source ({self.kind})" if self.path is None else f"the array in {self.path}"

    def close(self) -> None:
        """Release files. Safe to call twice."""


class _RowsRead(SourceRows):
    """Rows of a source that are read by its `read`."""

    def __init__(self, source: Source, row: int, cast: Cast | None) -> None:
        self._source, self._row, self._cast = source, row, cast

    def read(self, first: int, piece: HostArray) -> None:
        if self._cast is None:
            self._source.read(self._row + first, piece)
            return
        rows = np.empty(piece.shape, self._cast.source.carrier)
        self._source.read(self._row + first, rows)
        convert(piece, rows, self._cast)


class Sink(ABC):
    """Takes the result's rows, chunk by chunk, in any order.

    A sink from outside defines `write` and `finish`, and `abort` where it makes something. One whose rows can be moved
    without Python defines `target` instead of `write`.
    """

    where: str = "memory"  # where rows go: "memory", "fresh memory", "file" or "device"
    tensor: Any = None  # the CUDA tensor that the kernel itself writes rows to
    cast: Cast | None = None  # from the wire's element type to the result's; who opens a sink sets it
    resumable: bool = False  # what it left can be reopened (see `leave`)

    def write(self, first: int, piece: HostArray) -> None:
        """Store `piece`, contiguous rows of the result's element type (as its carrier), at rows
        [first, first + len(piece)) of the result. Called from any thread, for several pieces at once. `piece` is only
        valid during the call."""
        raise NotImplementedError(f"{type(self).__name__} defines neither write nor target; define one")

    def prepare(self) -> None:
        """Wait until there is room for all rows, where it has to be made. Called once, before the first chunk; raises
        where there won't be any."""

    def target(self, chunk: Chunk) -> TargetRows | DeviceRows:
        """Where the chunk's rows go."""
        return _RowsWritten(self, chunk.row, self.cast)

    def stop(self) -> None:
        """The run takes in nothing more: nobody needs to wait for room."""

    def commit(self, chunk: Chunk) -> None:
        """Every row of the chunk has been written. Called once a chunk, from the thread of the device that ran it."""

    @abstractmethod
    def finish(self, rows: int) -> Any:
        """The result, complete with `rows` rows."""

    def abort(self) -> None:
        """The run failed: remove what it made. Safe to call twice, and after a `finish` that raised."""

    def leave(self) -> None:
        """The run ended early: leave the rows that were written where a sink opened with `reopen` finds them again.
        Where the sink isn't `resumable`, the same as `abort`."""
        self.abort()


class _RowsWritten(TargetRows):
    """Rows that are stored by a sink's `write`."""

    def __init__(self, sink: Sink, row: int, cast: Cast | None) -> None:
        self._sink, self._row, self._cast = sink, row, cast

    def write(self, first: int, piece: HostArray) -> None:
        rows = piece
        if self._cast is not None:
            rows = np.empty(piece.shape, self._cast.target.carrier)
            convert(rows, piece, self._cast)
        self._sink.write(self._row + first, rows)
