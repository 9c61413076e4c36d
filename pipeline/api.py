"""`Pipeline` and `run_pipelined`: pick devices, open source and sink, run the executors, report."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np

from pipeline.arrays import HostArray
from pipeline.config import DEFAULT_STREAMS, GIB, auto_chunk_rows, rows_a_chunk
from pipeline.devices.base import Device
from pipeline.devices.names import find_devices, open_device
from pipeline.dtypes import FLOAT64, Cast, DType, parse_out_dtype, parse_precision, wire_dtypes
from pipeline.errors import DeviceMemoryError, DTypeError, OptionError, PipelineError, TraceWarning, uninterrupted
from pipeline.executor import Executor
from pipeline.flow import Chunk, Fill, Gather, Sink, Source, Workers
from pipeline.instrument import KEPT, KEPT_FOR_TRACE, RUN, Ceilings, Ranges, Recorder
from pipeline.io.batches import BatchSink
from pipeline.io.memory import ArrayRows
from pipeline.io.sinks import open_sink, wrapper
from pipeline.io.sources import open_source
from pipeline.layer.linear import FusedLinear
from pipeline.report.stats import Ends, Stats, advice, bound, ceiling_rows_per_s, comparable, mean_share, stage_stats
from pipeline.report.timeline import Timeline, device_use, from_recorders
from pipeline.report.trace import check_trace, write_trace
from pipeline.staging.movers import Movers, Wire
from pipeline.staging.native import open_workers
from pipeline.tuning.tune import Tuning

_run_numbers = itertools.count()
_GATHER_BYTES, _FEWEST_BUFFERS = 96 * 2**20, 2  # pinned chunk buffers for iterables, all devices together
_MOST_CPU_ROWS = 2**20  # of an automatic chunk on the CPU


@dataclass(frozen=True)
class Progress:
    """How far a run has come; `rows_total` is None where only the end of the source will tell.

    `ceiling_rows_per_s` is what the devices' buses and kernels allow, None where that wasn't measured.
    """

    rows_done: int
    rows_total: int | None
    elapsed_s: float
    ceiling_rows_per_s: float | None = None

    @property
    def rows_per_s(self) -> float:
        return self.rows_done / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(eq=False)
class Result:
    """What a run gives back: `out`, the output, wherever it went, and `stats`, the figures."""

    out: Any
    _stats: Stats | Callable[[], Stats] = field(repr=False)

    @property
    def stats(self) -> Stats:
        """Computed when first asked for: that may take as long as a short run."""
        found = self._stats
        if not isinstance(found, Stats):
            found = self._stats = found()  # lets go of the record of the run's operations
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"out": self.out, "_stats": self.stats}


@dataclass
class _Lane:
    """One opened device with what moves rows to it and from it."""

    device: Device
    movers: Movers
    workers: Workers


class Pipeline:
    """Streams datasets through one layer, with devices, weights, kernels and pinned rings kept warm between runs.

        with Pipeline(layer) as pipeline:
            result = pipeline.run(x)

    Args:
        layer: the fused layer.
        chunk_rows: rows of one kernel launch, or "auto" (the wider side of a chunk is about 32 MiB; less for a
            source with few rows, so that its copies and kernels overlap).
        num_streams: chunks in flight on a device, each on its own stream, or "auto" (6).
        devices: None (every visible GPU, or the CPU where there is none), a name ("cpu", "cuda", "cuda:1", "sim") or
            a list of names that share the work.
        wire_dtype: "bf16" or "fp16": float32 rows are rounded to this type while they are staged, so that half the
            bytes cross the bus; weights are rounded too, the layer computes in this type (so its `precision` can't be
            chosen), and results come back in it. Their element type stays the source's unless `out_dtype` says
            otherwise. In fp16, what is beyond 65,504 becomes infinite.
        out_dtype: element type of results: "float32", "bfloat16", "float16", on the CPU "float64"; None keeps the
            source's. The rounding happens once, in the kernel.

    Raises:
        OptionError, DTypeError, DeviceNotFoundError: at once.
        DeviceMemoryError, CompileError: at once, before any data is touched.

    The pinned ring and the number of copy workers are those that a measurement on this machine found best: made by
    the first large run (8 GiB in and out together), in a second or two, and kept for later ones. `Stats.staging_origin`
    says where they come from; the environment variables of the README go before it.

    Use one Pipeline from one thread at a time, and close it (the `with` statement does): pinned and device memory
    are held until then.
    """

    def __init__(
        self,
        layer: FusedLinear,
        *,
        chunk_rows: int | str = "auto",
        num_streams: int | str = "auto",
        devices: str | list[str] | tuple[str, ...] | None = None,
        wire_dtype: Any = None,
        out_dtype: Any = None,
    ) -> None:
        if not isinstance(layer, FusedLinear):
            raise OptionError(
                f"layer is a {type(layer).__name__}, expected a FusedLinear; FusedLinear(weight, bias), "
                f"FusedLinear.from_linear and FusedLinear.from_file make one"
            )
        self.layer = layer
        self.out_dtype: DType = layer.dtype if out_dtype is None else parse_out_dtype(out_dtype)
        self.wire_in, self.wire_out = wire_dtypes(layer.dtype, wire_dtype, self.out_dtype, layer.precision)
        self._chooses_rows = chunk_rows == "auto"
        rows = _whole_number(chunk_rows, "chunk_rows")
        self.num_streams = _whole_number(num_streams, "num_streams") or DEFAULT_STREAMS
        self.device_names = find_devices(devices)
        self.chunk_rows = rows or _auto_chunk_rows(layer, self.wire_in, self.wire_out, self.device_names)
        for dtype in (layer.dtype, self.out_dtype):
            if dtype is FLOAT64 and any(name.startswith("cuda") for name in self.device_names):
                raise DTypeError("float64 is computed on the CPU only; pass devices='cpu', or convert to float32")
        self.ceilings: dict[str, Ceilings] = {}  # of the devices whose buses were measured; reports compare with them
        self._lanes: list[_Lane] = []
        self._workers: Workers | None = None  # of all devices without workers of their own
        self._wire_layer: FusedLinear | None = None
        self._gather: list[HostArray] = []  # pinned chunk buffers for iterables, kept between runs
        self._busy, self._pid = _Busy(), os.getpid()
        self._end_stream: Callable[[], None] | None = None
        self._closed = False
        self._devices: list[Device] = []
        try:
            for name in self.device_names:
                self._devices.append(open_device(name))
            self._tuning = Tuning(self._devices)
            self.staging = self._tuning.staging
            for device in self._devices:
                self._lanes.append(self._open(device))
            self._note_ceilings()
        except BaseException:
            self.close()
            raise

    def _open(self, device: Device) -> _Lane:
        workers = device.workers()
        if workers is None:
            self._workers = self._workers or open_workers(self.staging.workers)
            workers = self._workers
        if self._wire_layer is None:
            self._wire_layer = _layer_on_the_wire(self.layer, self.wire_in, workers)
        layer, dtype = self._wire_layer, self.wire_out
        device.prepare(layer, dtype, self.chunk_rows)
        _check_memory(device, layer, dtype, self.chunk_rows, self.num_streams)
        device.allocate(self.chunk_rows, self.num_streams)
        wire = Wire(layer.in_features, layer.out_features, layer.dtype, dtype)
        return _Lane(device, Movers(device, workers, wire, self.staging), workers)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End a stream that is still open and the worker threads, free pinned and device memory. Safe to call twice.

        Raises:
            PipelineError: a run is going on in another thread.
        """
        if os.getpid() != self._pid:  # forked: its threads and the driver's are the other process's
            self._closed = True
            return
        if self._end_stream is not None:
            self._end_stream()
        elif self._busy:
            raise PipelineError("this Pipeline is running; close it when its run is done")
        self._closed = True
        for lane in self._lanes:
            lane.movers.close()
            lane.workers.close()
        if self._workers is not None:
            self._workers.close()
        for device in self._devices:
            device.close()
        self._lanes, self._devices, self._workers = [], [], None
        self._gather = []

    # -- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        source: Any,
        out: Any = None,
        *,
        overwrite: bool = False,
        progress: Callable[[Progress], None] | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> Result:
        """Stream one dataset through the layer. Blocks until the result is complete.

        Args:
            source: (rows, in_features) of the layer's element type: a NumPy array or memmap of any strides and byte
                order, a torch CPU tensor (pinned memory is used in place, see `pin`), a CUDA tensor, the path of a
                .npy file, or an iterable of batches with any number of rows each.
            out: None (a new array or tensor of the source's kind comes back), an array or tensor
                (rows, out_features), also a CUDA tensor, or the path of a .npy file to write. A file appears under
                its name only when it is complete. Rows for an `np.memmap` are written to its file, where the space is
                reserved first; they are there, and in the map, when this returns, and on the disk after its flush().
            overwrite: replace an existing output file.
            progress: called with a `Progress` after each chunk, from the thread that runs its device.
            trace: a file for the run's timeline, replaced if it exists: .json for Perfetto and Chrome's trace viewer,
                .png for a picture, .html for a page with a timeline to zoom into (the last two need the extra "plot").
                A failure while it is written, after the run, is a `TraceWarning`: the result comes back all the same.

        Returns:
            A `Result` with `out` and `stats`.

        Raises:
            InputError, OutputError: source, out or trace can't be used; nothing has been written.
            DeviceError: a device failed.
            Exception: what the source or the sink raised, with a note that names the chunk and the stage.
        """
        with self._exclusive():
            if progress is not None and not callable(progress):
                raise OptionError(f"progress is {progress!r}, expected a function that takes a Progress, or None")
            if not isinstance(overwrite, (bool, np.bool_)):  # "no" would be true
                raise OptionError(f"overwrite is {overwrite!r}, expected True or False")
            if trace is not None:
                check_trace(trace)
            opened = open_source(source, self.layer, is_pinned=self._is_pinned)
            try:
                sink = open_sink(out, opened, self.layer, self.out_dtype, self.wire_out, overwrite)
                try:
                    keep = KEPT if trace is None else KEPT_FOR_TRACE
                    exact_rows_before = self._exact_rows()
                    record = self._run(opened, sink, progress, threading.Event(), keep)
                    value = sink.finish(record.rows)
                    record = record.completed(self._lanes[0].device.now())
                except BaseException:
                    sink.abort()
                    raise
            finally:
                opened.close()
            exact_rows = self._exact_rows() - exact_rows_before
            result = Result(value, self._stats(opened, sink, record, exact_rows))
            if trace is not None:
                try:
                    write_trace(trace, record.timeline(), result.stats.as_dict())
                except Exception as error:  # whatever it is, the result is complete and must reach the caller
                    reason = str(error) if isinstance(error, PipelineError) else f"{trace}: {error!r}"
                    text = f"the run is complete, but its timeline isn't written: {reason}"
                    warnings.warn(TraceWarning(text), stacklevel=2)
            return result

    def stream(self, batches: Iterable[Any]) -> Generator[Any, None, None]:
        """The layer's results of an iterable of batches, batch by batch and in order.

        Each result is a new array or tensor of the batches' kind with the batch's number of rows. A chunk never spans
        two batches, so a result comes as soon as its batch is done; batches of some hundred rows or more use a GPU
        well. At most a few batches are read ahead of the consumer. Closing the iterator early ends the run.

        Raises:
            InputError: a batch doesn't fit the layer. Exception: what the iterable raised.
        """
        with self._exclusive():
            sink = BatchSink(self.layer.out_features, self.out_dtype, self.wire_out, 2 * self.num_streams)
            source = open_source(batches, self.layer, sink.new_batch)
            if source.where != "batches":
                source.close()
                raise OptionError(f"stream() takes an iterable of batches, got one {source.kind}; use run() for it")
            wrap = wrapper(source, self.out_dtype)
            stopping = threading.Event()

            def run() -> None:
                try:
                    self._run(source, sink, None, stopping)
                    sink.end()
                except BaseException as error:  # raised again by results()
                    sink.end(error)

            # A daemon that is ended at exit: Python would wait for any other thread, and this one for the consumer.
            thread = threading.Thread(target=run, name="pipeline-stream", daemon=True)

            def end() -> None:
                stopping.set()
                sink.end(PipelineError("the Pipeline was closed while this stream was open"))
                if thread.ident is not None:
                    uninterrupted(thread.join)

            self._end_stream = end
            atexit.register(end)
            try:
                thread.start()
                for array in sink.results():
                    yield wrap(array)
            finally:
                end()
                atexit.unregister(end)
                self._end_stream = None

    def _exclusive(self) -> _Exclusive:
        if self._closed:
            raise PipelineError("this Pipeline is closed; make a new one")
        if os.getpid() != self._pid:
            raise PipelineError(
                "this Pipeline was made before this process was forked; make a new one here, for GPUs in a process "
                "that is spawned instead (multiprocessing.get_context('spawn'))"
            )
        return _Exclusive(self._busy)

    def _is_pinned(self, array: HostArray) -> bool:
        """Whether copy engines can use contiguous memory of the caller's as it is."""
        return any(device.has_bus and device.in_place(array) for device in self._devices)

    def _lanes_for(self, source: Source, sink: Sink) -> list[_Lane]:
        """The devices that take part: with a CUDA tensor at either end, the one that it is on."""
        ends = {} if source.tensor is None else {"source": source.tensor}
        if ends and self.wire_in is not self.layer.dtype:
            raise OptionError("wire_dtype is for rows that cross the bus, the source is a CUDA tensor; leave it out")
        if sink.tensor is not None:
            ends["out"] = sink.tensor
        lanes = self._lanes
        for what, tensor in ends.items():
            device = f"cuda:{tensor.device.index}"
            lanes = [lane for lane in lanes if lane.device.name == device]
            if not lanes:
                raise OptionError(
                    f"{what} is on {device}, this run uses {', '.join(self.device_names)}; pass devices={device!r}, or "
                    f"the tensor's .cpu()"
                )
            lanes[0].device.order_after(tensor)
        return lanes

    def _run(
        self,
        source: Source,
        sink: Sink,
        progress: Callable[[Progress], None] | None,
        stopping: threading.Event,
        keep: int = KEPT,
    ) -> _Record:
        """Run all devices to the end of the source."""
        lanes = self._lanes_for(source, sink)
        self._tune(source, sink)
        recorders = [Recorder(lane.device.name, keep) for lane in lanes]
        done = _Count(source.rows, progress, self._ceiling_rows_per_s(lanes))
        ranges, number = Ranges(), next(_run_numbers)
        start = lanes[0].device.now()
        gather = Gather(self._gather_buffers(), self._gather_depth(len(lanes)), lanes[0].workers.run)
        feed = source.feed(self._rows_a_chunk(source, len(lanes)), gather, self.wire_in)  # reads nothing yet
        errors: list[BaseException] = []

        def run(lane: _Lane, recorder: Recorder) -> None:
            try:
                with ranges(RUN, number):
                    Executor(lane.device, lane.movers, self.num_streams, feed, sink, recorder, done.add, stopping).run()
            except BaseException as error:
                errors.append(error)
                stopping.set()

        threads = [
            threading.Thread(target=run, args=pair, name=f"pipeline-{pair[0].device.name}")
            for pair in list(zip(lanes, recorders, strict=True))[1:]
        ]
        try:
            for thread in threads:
                thread.start()
            run(lanes[0], recorders[0])  # in this thread, so that an interrupt reaches it
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt while the other devices are at work
            errors.append(error)
            stopping.set()
            for thread in threads:
                if thread.ident is not None:  # it was started
                    uninterrupted(thread.join)
        sink.stop()
        try:
            uninterrupted(feed.stop)
        except BaseException as error:  # a reader that hangs, or an interrupt; what made it stop comes first
            errors.append(error)
        if errors:
            try:
                raise errors[0]
            finally:
                errors.clear()  # an error in a frame that it names would keep the caller's data alive
        seconds = lanes[0].device.now() - start
        hardware = {lane.device.name: lane.device.description for lane in lanes}
        return _Record(done.rows, start, seconds, recorders, hardware)

    def _tune(self, source: Source, sink: Sink) -> None:
        """Measure this machine's copies, once and where the run is large enough, and stage rows as suits them."""
        row_bytes = 0 if source.where == "device" else self._wire_row_bytes[0]
        row_bytes += 0 if sink.where == "device" else self._wire_row_bytes[1]
        if not self._tuning.pays((source.rows or 0) * row_bytes):
            return
        self._tuning.measure(source.memory)
        before, self.staging = self.staging, self._tuning.staging
        old = self._workers
        if old is not None and self.staging.workers != before.workers:
            self._workers = open_workers(self.staging.workers)
        for lane in self._lanes:
            if lane.workers is old and self._workers is not None:
                lane.workers = self._workers
            lane.movers.restage(lane.workers, self.staging)
        if old is not None and old is not self._workers:
            old.close()
        self._note_ceilings()

    def _note_ceilings(self) -> None:
        if self._tuning.measured is not None:
            found = self._tuning.measured.ceilings(*self._wire_row_bytes, len(self._devices))
            self.ceilings = {device.name: found for device in self._devices}

    @property
    def _wire_row_bytes(self) -> tuple[int, int]:
        """Bytes of a row on the bus, in and out."""
        return self.layer.in_features * self.wire_in.itemsize, self.layer.out_features * self.wire_out.itemsize

    def _ceiling_rows_per_s(self, lanes: list[_Lane]) -> float | None:
        layer = self.layer
        return ceiling_rows_per_s(
            self.ceilings,
            [lane.device.name for lane in lanes],
            *self._wire_row_bytes,
            2 * layer.in_features * layer.out_features,
        )

    def _rows_a_chunk(self, source: Source, devices: int) -> int:
        """The rows of a run's chunks: `chunk_rows`, or fewer where they were to be chosen and the source is short."""
        if not self._chooses_rows or source.rows is None:
            return self.chunk_rows
        if self.device_names == ["cpu"]:  # whose threads wait for each other at the end of each chunk
            return rows_a_chunk(source.rows, devices, self.chunk_rows, fewest_chunks=2)
        return rows_a_chunk(source.rows, devices, self.chunk_rows)

    def _gather_depth(self, devices: int) -> int:
        """How many chunk buffers an iterable's rows are gathered in: a chunk leaves its buffer when it is copied to the
        device, so a few are enough for all devices."""
        chunk_bytes = self.chunk_rows * self._wire_row_bytes[0]
        return min(self.num_streams * devices + 1, max(_FEWEST_BUFFERS, _GATHER_BYTES // chunk_bytes))

    def _gather_buffers(self) -> Callable[[int], HostArray]:
        """Allocates pinned chunk buffers for sources that gather rows, reusing those of earlier runs."""
        unused = list(self._gather)

        def take(n_bytes: int) -> HostArray:
            if unused:
                return unused.pop()
            self._gather.append(self._lanes[0].device.pinned(n_bytes))
            return self._gather[-1]

        return take

    def _exact_rows(self) -> int:
        return sum(lane.device.exact_rows() for lane in self._lanes)

    def _stats(self, source: Source, sink: Sink, record: _Record, exact_rows: int) -> Callable[[], Stats]:
        """What computes the figures of a run, whatever becomes of this Pipeline meanwhile."""
        layer, rows, seconds = self.layer, record.rows, record.seconds
        ends = _ends(source, sink)
        finish_share = record.finish_s / seconds if seconds and ends.target == "file" else 0.0
        ceilings = {name: comparable(self.ceilings[name], ends) for name in record.hardware if name in self.ceilings}
        lanes = [lane for lane in self._lanes if lane.device.name in record.hardware]
        bytes_in = rows * layer.in_features * layer.dtype.itemsize
        bytes_out = rows * layer.out_features * self.out_dtype.itemsize
        flop = 2 * rows * layer.in_features * layer.out_features
        runs_as, on_cpu = lanes[0].device.runs_as, lanes[0].device.name == "cpu"
        known = functools.partial(
            Stats,
            rows=rows,
            seconds=seconds,
            finish_s=record.finish_s,
            rows_per_s=rows / seconds if seconds else 0.0,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            gb_per_s_in=bytes_in / seconds / 1e9 if seconds else 0.0,
            gb_per_s_out=bytes_out / seconds / 1e9 if seconds else 0.0,
            tflops=flop / seconds / 1e12 if seconds else 0.0,
            ceilings=ceilings,
            devices=record.hardware,
            kernel=lanes[0].device.kernel,
            precision=layer.precision if self.wire_in is layer.dtype else parse_precision(None, self.wire_in),
            runs_as=runs_as,
            exact_rows=exact_rows,
            wire=self.wire_in.name,
            chunk_rows=self._rows_a_chunk(source, len(lanes)),
            num_streams=self.num_streams,
            copy_workers=lanes[0].workers.description,
            piece_bytes=self.staging.piece_bytes,
            ring_pieces=self.staging.ring_pieces,
            staging_origin=self.staging.origin,
            pinned_bytes=sum(lane.movers.pinned_bytes for lane in lanes) + sum(each.nbytes for each in self._gather),
            source=source.kind,
        )

        def compute() -> Stats:
            uses = [device_use(operations) for operations in record.timeline().devices.values()]
            stages = stage_stats(record.recorders, seconds, uses, ceilings, flop)
            return known(
                stages=stages,
                bound=bound(stages, finish_share),
                advice=advice(stages, runs_as, on_cpu, ends, finish_share),
                kernel_hidden_share=mean_share([use.kernel_hidden_share for use in uses]),
                copy_hidden_share=mean_share([use.copy_hidden_share for use in uses]),
                chunks=stages["kernel"].count,
            )

        return compute


@dataclass(frozen=True)
class _Record:
    """What a run leaves behind."""

    rows: int
    start_s: float
    seconds: float
    recorders: list[Recorder]
    hardware: dict[str, str]  # of the devices that took part
    finish_s: float = 0.0  # of `seconds`, after the last row was stored

    def completed(self, now_s: float) -> _Record:
        """The record of a run whose result was completed at that moment."""
        seconds = now_s - self.start_s
        return replace(self, seconds=seconds, finish_s=seconds - self.seconds)

    def timeline(self) -> Timeline:
        return from_recorders(self.recorders, self.start_s, self.hardware)


def run_pipelined(
    layer: FusedLinear,
    source: Any,
    out: Any = None,
    *,
    chunk_rows: int | str = "auto",
    num_streams: int | str = "auto",
    devices: str | list[str] | tuple[str, ...] | None = None,
    wire_dtype: Any = None,
    out_dtype: Any = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    trace: str | os.PathLike[str] | None = None,
) -> Result:
    """Stream one dataset through the layer: `Pipeline(...)`.run(...) in one call. See both for the arguments."""
    with Pipeline(
        layer,
        chunk_rows=chunk_rows,
        num_streams=num_streams,
        devices=devices,
        wire_dtype=wire_dtype,
        out_dtype=out_dtype,
    ) as pipeline:
        return pipeline.run(source, out, overwrite=overwrite, progress=progress, trace=trace)


class _Busy:
    """Which run holds a Pipeline. True while one does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: weakref.ref[_Exclusive] | None = None

    def __bool__(self) -> bool:
        return self._holder is not None and self._holder() is not None

    def take(self, holder: _Exclusive) -> bool:
        """Whether it wasn't held. NOTE: an interrupt may lose the holder before it can let go; its end does that."""
        with self._lock:
            if self:
                return False
            self._holder = weakref.ref(holder)
            return True

    def let_go(self) -> None:
        self._holder = None


class _Exclusive:
    """Holds a Pipeline for one run."""

    def __init__(self, busy: _Busy) -> None:
        self._busy = busy

    def __enter__(self) -> None:
        if not self._busy.take(self):
            raise PipelineError(
                "this Pipeline is running already; finish or close its stream first, or make a second Pipeline"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._busy.let_go()


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


def _whole_number(value: int | str, name: str) -> int | None:
    """`value`, or None for "auto".

    Raises:
        OptionError: neither "auto" nor a whole number of at least 1.
    """
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise OptionError(f"{name} is {value!r}, expected 'auto' or a whole number of at least 1")
    return int(value)


def _layer_on_the_wire(layer: FusedLinear, wire: DType, workers: Workers) -> FusedLinear:
    """The layer with its weights in the wire's element type."""
    if wire is layer.dtype:
        return layer

    def narrow(array: HostArray) -> HostArray:
        rounded = np.empty(array.shape, wire.carrier)
        workers.run(Fill(ArrayRows(array, Cast(layer.dtype, wire)), 0, rounded))
        return rounded

    return layer.rounded_to(wire, narrow)


def _ends(source: Source, sink: Sink) -> Ends:
    return Ends(source.where, sink.where)


def _auto_chunk_rows(layer: FusedLinear, wire_in: DType, wire_out: DType, devices: list[str]) -> int:
    """Rows of a chunk of about 32 MiB on its wider side."""
    row_bytes = max(layer.in_features * wire_in.itemsize, layer.out_features * wire_out.itemsize)
    if devices == ["cpu"]:  # whose threads wait for each other at the end of each chunk
        return auto_chunk_rows(row_bytes, most=_MOST_CPU_ROWS)
    return auto_chunk_rows(row_bytes)


def _check_memory(device: Device, layer: FusedLinear, out_dtype: DType, chunk_rows: int, num_streams: int) -> None:
    """Check that the slots fit into the device's free memory.

    Raises:
        DeviceMemoryError: the slots don't fit beside the weights.
    """
    free = device.free_bytes()
    row_bytes = layer.in_features * layer.dtype.itemsize + layer.out_features * out_dtype.itemsize
    needed = num_streams * chunk_rows * row_bytes
    if free is not None and needed > free:
        fitting_rows = free // (num_streams * row_bytes)
        smaller = f"chunk_rows={fitting_rows} or less, or " if fitting_rows else ""
        raise DeviceMemoryError(
            f"{num_streams} chunks of {chunk_rows} rows need {needed / GIB:.2f} GiB on {device.name}, "
            f"{free / GIB:.2f} GiB are free: pass {smaller}fewer num_streams"
        )
