"""One pass of a dataset through a fleet's devices: its feed, its sink, its threads, its errors, its record."""

from __future__ import annotations

import atexit
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.dtypes import parse_precision
from pipeline.errors import OptionError, PipelineError, uninterrupted
from pipeline.fleet import Fleet
from pipeline.flow import Chunk, Feed, Gather, Sink, Source
from pipeline.instrument import KEPT, KEPT_FOR_TRACE, RUN, Ranges, Recorder
from pipeline.io.batches import BatchSink
from pipeline.io.memory import wrapper
from pipeline.io.registry import SinkRequest, SourceRequest
from pipeline.io.sinks import open_sink
from pipeline.io.sources import open_source
from pipeline.options import Progress, RunOptions
from pipeline.report.record import Ends, Parts, Record, Setup
from pipeline.report.stats import ceiling_rows_per_s
from pipeline.station import Station

_numbers = itertools.count()  # the runs of this process are numbered, for profilers


def run_dataset(
    fleet: Fleet, source: Any, out: Any, options: RunOptions, called_s: float | None = None
) -> tuple[Any, Record]:
    """Stream `source` to `out`, which are what the caller passed. Blocks; gives the result and the run's record.

    The run's seconds count from `called_s`, on the clock of time.perf_counter; by default from now.
    """
    called_s = time.perf_counter() if called_s is None else called_s
    layer = fleet.layer
    fleet.start_opening()  # meanwhile the ends are opened
    opened = open_source(source, SourceRequest(layer.in_features, layer.dtype, fleet.is_pinned, before_rows=fleet.open))
    try:
        request = SinkRequest(opened, layer.out_features, fleet.out_dtype, fleet.wire_out, options.overwrite)
        sink = open_sink(out, request)
        try:
            fleet.open()
            run = Run(fleet, opened, sink, options, called_s)
            run.move_rows()
            value = sink.finish(run.rows)
            return value, run.completed()
        except BaseException:
            sink.abort()
            raise
    finally:
        opened.close()


class Run:
    """Moves every row of an opened source through a fleet's devices to a sink."""

    def __init__(self, fleet: Fleet, source: Source, sink: Sink, options: RunOptions, called_s: float) -> None:
        """Choose the devices that take part, and measure their copies where that pays.

        The run's seconds count from `called_s`, on the clock of time.perf_counter. Where the first device has a clock
        of its own, they count from now.

        Raises:
            OptionError: the ends don't go with the devices.
        """
        self._fleet, self._source, self._sink = fleet, source, sink
        self._exact_rows_before = self._exact_rows()
        self._stations = fleet.stations_for(source.tensor, sink.tensor)
        first = self._stations[0].device
        self._clock = first.now
        self._called_s = called_s if first.host_clock else first.now()
        fleet.tune(source, sink)
        keep = KEPT if options.trace is None else KEPT_FOR_TRACE
        self._recorders = [Recorder(station.device.name, keep) for station in self._stations]
        self._chunk_rows = fleet.rows_per_chunk(source.rows, len(self._stations))
        self._done = _Count(source.rows, options.progress, self._ceiling_rows_per_s())
        self._stopping = threading.Event()
        self._errors: list[BaseException] = []
        self._start_s = self._moved_s = self._room_s = 0.0

    @property
    def rows(self) -> int:
        """That have been committed so far."""
        return self._done.rows

    def stop(self) -> None:
        """End the intake, from any thread: `move_rows` returns when what is in flight is done."""
        self._stopping.set()

    def move_rows(self) -> None:
        """Run all devices to the end of the source. Blocks.

        Raises:
            Exception: the first that a device, the source or the sink raised; nothing is in flight any more.
        """
        ready_s = self._clock()
        self._sink.prepare()
        self._room_s = self._clock() - ready_s
        ranges, number = Ranges(), next(_numbers)
        self._start_s = self._clock()
        gather = Gather(
            self._fleet.take_gather_buffers(),
            self._fleet.gather_depth(len(self._stations)),
            self._stations[0].workers.run,
        )
        feed = self._source.feed(self._chunk_rows, gather, self._fleet.wire_in)  # reads nothing yet

        def run(station: Station, recorder: Recorder) -> None:
            try:
                with ranges(RUN, number):
                    station.run(feed, self._sink, recorder, self._done.add, self._stopping)
            except BaseException as error:
                self._fail(error)

        self._run_on_every_device(run)
        self._end_intake(feed)
        if self._errors:
            try:
                raise self._errors[0]
            finally:
                self._errors.clear()  # an error in a frame that it names would keep the caller's data alive
        self._moved_s = self._clock()

    def _run_on_every_device(self, run: Callable[[Station, Recorder], None]) -> None:
        """The first device in this thread, so that an interrupt reaches it, the others in threads of their own."""
        pairs = list(zip(self._stations, self._recorders, strict=True))
        threads = [
            threading.Thread(target=run, args=pair, name=f"pipeline-{pair[0].device.name}") for pair in pairs[1:]
        ]
        try:
            for thread in threads:
                thread.start()
            run(*pairs[0])
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt while the other devices are at work
            self._fail(error)
            for thread in threads:
                if thread.ident is not None:  # it was started
                    uninterrupted(thread.join)

    def _end_intake(self, feed: Feed) -> None:
        for stop in (self._sink.stop, functools.partial(uninterrupted, feed.stop)):
            try:
                stop()
            except BaseException as error:  # a reader that hangs, or an interrupt; what made it stop comes first
                self._errors.append(error)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._stopping.set()

    def completed(self) -> Record:
        """The record of this run, whose result is complete now."""
        now_s, first_s = self._clock(), self._first_s()
        return Record(
            setup=self._setup(self._moved_s - first_s),
            rows=self.rows,
            start_s=first_s,
            parts=Parts(first_s - self._called_s, self._moved_s - first_s, now_s - self._moved_s, room_s=self._room_s),
            exact_rows=self._exact_rows() - self._exact_rows_before,
            recorders=self._recorders,
        )

    def _first_s(self) -> float:
        """When the first row began to move."""
        first_s = min(recorder.first_s for recorder in self._recorders)
        return min(max(first_s, self._start_s), self._moved_s)  # another device may have another clock

    def _setup(self, run_s: float) -> Setup:
        fleet, layer, first = self._fleet, self._fleet.layer, self._stations[0]
        devices = {station.device.name: station.device.description for station in self._stations}
        pinned = sum(station.pinned_bytes for station in self._stations)
        return Setup(
            devices=devices,
            ceilings=fleet.ceilings_of(self._recorders, run_s),
            kernel=first.device.kernel,
            precision=layer.precision if fleet.wire_in is layer.dtype else parse_precision(None, fleet.wire_in),
            runs_as=first.device.runs_as,
            in_features=layer.in_features,
            out_features=layer.out_features,
            in_row_bytes=layer.in_features * layer.dtype.itemsize,
            out_row_bytes=layer.out_features * fleet.out_dtype.itemsize,
            wire=fleet.wire_in.name,
            chunk_rows=self._chunk_rows,
            num_streams=fleet.options.streams,
            copy_workers=first.workers.description,
            staging=fleet.staging,
            pinned_bytes=pinned + sum(buffer.nbytes for buffer in fleet.gather_buffers),
            source=self._source.kind,
            ends=Ends(self._source.where, self._sink.where),
        )

    def _exact_rows(self) -> int:
        return sum(station.device.exact_rows() for station in self._fleet.stations)

    def _ceiling_rows_per_s(self) -> float | None:
        fleet, layer = self._fleet, self._fleet.layer
        names = [station.device.name for station in self._stations]
        row_flop = 2 * layer.in_features * layer.out_features
        return ceiling_rows_per_s(fleet.ceilings, names, *fleet.wire_row_bytes, row_flop)


class Stream:
    """A run in a thread of its own, whose results a consumer takes batch by batch.

    Raises:
        InputError: a batch doesn't fit the layer. OptionError: no iterable of batches.
    """

    def __init__(self, fleet: Fleet, batches: Iterable[Any]) -> None:
        layer = fleet.layer
        sink = BatchSink(layer.out_features, fleet.out_dtype, fleet.wire_out, 2 * fleet.options.streams)
        source = open_source(batches, SourceRequest(layer.in_features, layer.dtype, on_batch=sink.new_batch))
        if source.where != "batches":
            source.close()
            raise OptionError(f"stream() takes an iterable of batches, got one {source.kind}; use run() for it")
        self._sink, self._wrap = sink, wrapper(source, fleet.out_dtype)
        self._run = Run(fleet, source, sink, fleet.options, time.perf_counter())
        # A daemon that is ended at exit: Python would wait for any other thread, and this one for the consumer.
        self._thread = threading.Thread(target=self._move_rows, name="pipeline-stream", daemon=True)

    def _move_rows(self) -> None:
        try:
            self._run.move_rows()
            self._sink.end()
        except BaseException as error:  # raised again by results()
            self._sink.end(error)

    def results(self) -> Iterator[Any]:
        """Each batch's result, in order. Raises what the iterable or the run raised, after the results before it."""
        atexit.register(self.end)
        try:
            self._thread.start()
            for array in self._sink.results():
                yield self._wrap(array)
        finally:
            self.end()
            atexit.unregister(self.end)

    def end(self) -> None:
        """End the run, from any thread. A consumer that still waits gets an error that says so."""
        self._run.stop()
        self._sink.end(PipelineError("the Pipeline was closed while this stream was open"))
        if self._thread.ident is not None:
            uninterrupted(self._thread.join)


class _Count:
    """Counts finished rows over all devices and reports progress."""

    def __init__(
        self, total: int | None, progress: Callable[[Progress], None] | None, ceiling_rows_per_s: float | None
    ) -> None:
        self.rows = 0
        self._total, self._progress, self._ceiling = total, progress, ceiling_rows_per_s
        self._lock, self._start = threading.Lock(), time.perf_counter()

    def add(self, chunk: Chunk) -> None:
        with self._lock:
            self.rows += chunk.rows
            if self._progress is not None:
                self._progress(Progress(self.rows, self._total, time.perf_counter() - self._start, self._ceiling))
