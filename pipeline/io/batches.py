"""Iterables of batches as sources, and streams of results, batch by batch."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any

import numpy as np

from pipeline.arrays import HostArray, host_view, is_cuda, is_torch
from pipeline.dtypes import DType, cast_between
from pipeline.errors import InputError, PipelineError
from pipeline.flow import BatchResult, Chunk, Feed, Gather, Sink, Source
from pipeline.io.memory import ArrayRows
from pipeline.io.registry import SourceRequest
from pipeline.rows import Fill

_PATIENCE_S = 5.0  # how long a run that stops waits for the iterable's next batch


class BatchSource(Source):
    """An iterable of batches: NumPy arrays or torch CPU tensors of shape (any number of rows, features).

    A thread pulls the batches and gathers their rows into pinned chunk buffers, so a batch's memory may be used again
    by the iterable as soon as the next one is asked for. At most `depth` chunks are read ahead.
    """

    kind, where, gathers, rows = "iterable of batches", "batches", True, None

    def __init__(self, batches: Iterable[Any], request: SourceRequest) -> None:
        self._request, self.on_batch = request, request.on_batch
        self._batches = iter(batches)
        self._first: list[Any] = []
        self.features, self.dtype = request.in_features, request.dtype
        for batch in self._batches:
            self._first = [batch]
            self._check(batch, 0)
            self.family = "torch" if is_torch(batch) else "numpy"
            break

    def _check(self, batch: Any, number: int) -> HostArray:
        what = f"batch {number}"
        if not (is_torch(batch) or hasattr(batch, "__array__")):
            raise InputError(
                f"{what} is a {type(batch).__name__}, expected a NumPy array or torch tensor of rows; pass arrays, "
                f"and of pairs the rows alone, for example (x for x, _ in loader)"
            )
        if is_cuda(batch):
            raise InputError(f"{what} is a CUDA tensor, expected host memory; pass the whole CUDA tensor as the source")
        array, dtype = host_view(batch, what)
        self._request.check_rows(array.shape, what)
        self._request.check_dtype(dtype, what)
        return array

    def feed(self, chunk_rows: int, gather: Gather, wire: DType, skip: AbstractSet[int] = frozenset()) -> Feed:
        return _BatchFeed(self, chunk_rows, gather, wire, skip)

    def arrays(self) -> Iterator[HostArray]:
        """Each batch, checked, as an array."""
        number = 0
        while self._first:
            yield self._check(self._first.pop(), number)
            number += 1
            for batch in self._batches:
                self._first.append(batch)
                break


def open_source(value: Any, request: SourceRequest) -> Source:
    """The source of an iterable of batches. Pulls the first one.

    Raises:
        InputError, ShapeError, DTypeError: the first batch can't be streamed. Exception: what the iterable raised.
    """
    if isinstance(value, GeneratorType) and value.gi_frame is None:  # it would pass for an empty dataset
        raise InputError("source is a generator that has ended already, expected a new one for each run")
    request.before_rows()
    return BatchSource(value, request)


@dataclass
class _Filling:
    """The chunk that is being gathered; into nothing where it is skipped."""

    index: int
    row: int
    buffer: HostArray | None
    start_s: float
    rows: int = 0


@dataclass
class _BatchFeed(Feed):
    source: BatchSource
    chunk_rows: int
    gather: Gather
    wire: DType
    skip: AbstractSet[int] = frozenset()
    _ready: queue.SimpleQueue[Chunk] = field(default_factory=queue.SimpleQueue)
    _free: queue.SimpleQueue[HostArray | None] = field(default_factory=queue.SimpleQueue)
    _error: BaseException | None = None
    _finished: bool = False
    _stopping: bool = False
    _copying: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._cast = cast_between(self.source.dtype, self.wire)
        self._allocated = 0
        self._next = (0, 0)  # index and row of the next chunk
        self._thread = threading.Thread(target=self._read, name="pipeline-reader", daemon=True)
        self._started = False

    def _read(self) -> None:
        try:
            filling: _Filling | None = None
            try:
                for batch in self.source.arrays():
                    if self._stopping:
                        return
                    filling = self._gather(batch, filling)
            finally:
                if filling is not None and filling.rows and not self._stopping:
                    self._emit(filling)
        except BaseException as error:  # raised again by take(), after the chunks that came before it
            self._error = error
        finally:
            self._finished = True

    def _gather(self, batch: HostArray, filling: _Filling | None) -> _Filling | None:
        """Copy a batch's rows into chunk buffers; emit those that are full, in a stream also the batch's last."""
        result = None
        if self.source.on_batch is not None:
            result = self.source.on_batch(len(batch))
            if result is None:  # the consumer has gone
                self._stopping = True
                return None
        at = 0
        while at < len(batch):
            filling = filling or self._begin()
            if filling is None:
                return None
            rows = min(len(batch) - at, self.chunk_rows - filling.rows)
            if filling.buffer is not None and not self._copy(batch[at : at + rows], filling.buffer[filling.rows :]):
                return None
            filling.rows += rows
            at += rows
            if filling.rows == self.chunk_rows or (result is not None and at == len(batch)):
                self._emit(filling, result, at - filling.rows)
                filling = None
        return filling

    def _begin(self) -> _Filling | None:
        """The next chunk, empty; None once the run stops."""
        index, row = self._next
        if index in self.skip:
            return _Filling(index, row, None, 0.0)
        buffer = self._buffer()
        return None if buffer is None else _Filling(index, row, buffer, time.perf_counter())

    def _copy(self, rows: HostArray, place: HostArray) -> bool:
        """Copy rows to the beginning of `place`; False where the run has stopped instead."""
        self._copying = True  # before the look at `_stopping`: stop() sets that before it looks at this
        try:
            if self._stopping:  # the chunk buffers may belong to the next run soon
                return False
            self.gather.copy(Fill(ArrayRows(rows, self._cast), 0, place[: len(rows)]))
            return True
        finally:
            self._copying = False

    def _emit(self, filling: _Filling, batch: BatchResult | None = None, batch_row: int = 0) -> None:
        self._next = (filling.index + 1, filling.row + filling.rows)
        buffer = filling.buffer
        if buffer is None:
            self.skipped_rows += filling.rows
            return
        self._ready.put(
            Chunk(
                filling.index,
                filling.row,
                filling.rows,
                ArrayRows(buffer[: filling.rows]),
                release=lambda: self._free.put(buffer),
                filled=(filling.start_s, time.perf_counter()),
                batch=batch,
                batch_row=batch_row,
            )
        )

    def _buffer(self) -> HostArray | None:
        """A free chunk buffer; None once the run stops."""
        if self._stopping:
            return None
        if self._allocated < self.gather.depth:
            self._allocated += 1
            features = self.source.features
            memory = self.gather.buffers(self.chunk_rows * features * self.wire.itemsize)
            return memory.view(self.wire.carrier).reshape(self.chunk_rows, features)
        return self._free.get()

    def take(self) -> Chunk | None:
        with self._lock:
            if not self._started:  # not before: nobody could stop it if an interrupt came first
                self._started = True
                self._thread.start()
            finished = self._finished  # read before the queue: nothing is added afterwards
            try:
                return self._ready.get_nowait()
            except queue.Empty:
                pass
            if finished and self._error is not None:
                error, self._error = self._error, None
                raise error
            return None

    @property
    def exhausted(self) -> bool:
        return self._finished and self._error is None and self._ready.empty()

    def stop(self) -> None:
        """End the reader. An iterable that blocks for ever can't be interrupted: its thread is left after 5 s."""
        self._stopping = True
        self._free.put(None)
        until_s = time.monotonic() + _PATIENCE_S
        while self._thread.is_alive() and (self._copying or time.monotonic() < until_s):
            self._thread.join(0.05)
        if self._thread.is_alive():
            raise PipelineError(
                "the source iterable hasn't returned for 5 s after the run stopped, so its reader thread is left "
                "behind; let the iterable end or raise when its own input stops"
            )


class BatchSink(Sink):
    """The results of a stream's batches, handed to a consumer in order while the run goes on in another thread.

    At most `limit` batches are anywhere between the source and the consumer.
    """

    def __init__(self, out_features: int, dtype: DType, wire: DType, limit: int) -> None:
        self._features, self._dtype, self._limit = out_features, dtype, limit
        self.cast = cast_between(wire, dtype)
        self._changed = threading.Condition()
        self._batches: deque[BatchResult] = deque()
        self._stopped = False
        self._ended = False
        self._error: BaseException | None = None

    def new_batch(self, rows: int) -> BatchResult | None:
        """Room for the next batch's result. Blocks while the consumer is behind; None once the run takes no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._batches) < self._limit)
            if self._stopped:
                return None
            batch = BatchResult(np.empty((rows, self._features), self._dtype.carrier), rows)
            self._batches.append(batch)
            self._changed.notify_all()
            return batch

    def target(self, chunk: Chunk) -> ArrayRows:
        if chunk.batch is None:
            raise PipelineError("a stream's chunk belongs to no batch")
        rows = chunk.batch.array[chunk.batch_row : chunk.batch_row + chunk.rows]
        return ArrayRows(rows, self.cast, fresh=True)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def commit(self, chunk: Chunk) -> None:
        with self._changed:
            if chunk.batch is not None:
                chunk.batch.missing -= chunk.rows
            self._changed.notify_all()

    def results(self) -> Iterator[HostArray]:
        """Each batch's result as soon as it is complete. Raises the run's error after the results before it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._is_ready())
                if not self._is_ready():
                    break
                batch = self._batches.popleft()
                self._changed.notify_all()
            yield batch.array
        if self._error is not None:
            raise self._error

    def _is_ready(self) -> bool:
        return bool(self._batches) and self._batches[0].missing == 0

    def end(self, error: BaseException | None = None) -> None:
        """The run is over, or must not go on: nobody waits any more."""
        with self._changed:
            self._error = self._error or error
            self._stopped = self._ended = True
            self._changed.notify_all()

    def finish(self, rows: int) -> None:
        return None
