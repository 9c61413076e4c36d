"""`Pipeline` and `run_pipelined`: what Python programs stream datasets with."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from pipeline.config import Staging
from pipeline.devices.names import import_gpu_code
from pipeline.dtypes import DType
from pipeline.errors import PipelineError, TraceWarning
from pipeline.exclusive import Turn, Turns
from pipeline.fleet import Fleet
from pipeline.instrument import Ceilings
from pipeline.kept import KEPT
from pipeline.keywords import takes_options
from pipeline.layer.base import Layer
from pipeline.options import ONE_RUN_OPTIONS, OPTIONS, PIPELINE_OPTIONS, RunOptions
from pipeline.report.record import Record
from pipeline.report.stats import Stats, stats_of
from pipeline.report.trace import check_trace, write_trace
from pipeline.run import Stream, run_dataset
from pipeline.staging.host_library import find_library

import_gpu_code()  # so that the first call spends its time on rows; the same goes for the library in C
find_library()


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


@takes_options(PIPELINE_OPTIONS)
class Pipeline:
    """Streams datasets through one layer, with devices, weights, kernels and pinned rings kept warm between runs.

        with Pipeline(layer) as pipeline:
            result = pipeline.run(x)

    Args:
        layer: the fused layer.
        {options}

    Raises:
        OptionError, DTypeError, DeviceNotFoundError: at once.
        DeviceMemoryError, CompileError: at once, before any data is touched.

    The pinned ring and the number of copy workers are those that a measurement on this machine found best: made in a
    second or two before the run with which a Pipeline has moved 256 GiB in and out together, and kept for later ones.
    `Stats.staging_origin` says where they come from; the environment variables of the README go before it.

    Use one Pipeline from one thread at a time, and close it (the `with` statement does): pinned and device memory
    are held until then.
    """

    def __init__(self, layer: Layer, **options: Any) -> None:
        self.layer = layer
        self.fleet = Fleet(layer, RunOptions(**options), KEPT.release)
        self.fleet.open()
        self._turns = Turns()
        self._stream: Stream | None = None
        self._closed = False

    @property
    def device_names(self) -> list[str]:
        """The devices that share the work."""
        return self.fleet.device_names

    @property
    def chunk_rows(self) -> int:
        """Rows of the largest chunks."""
        return self.fleet.chunk_rows

    @property
    def num_streams(self) -> int:
        """Chunks in flight on a device."""
        return self.fleet.options.streams

    @property
    def out_dtype(self) -> DType:
        """The element type of results."""
        return self.fleet.out_dtype

    @property
    def staging(self) -> Staging:
        """The pinned ring and the copy workers in force."""
        return self.fleet.staging

    @property
    def ceilings(self) -> dict[str, Ceilings]:
        """What was measured of the devices, by their names."""
        return self.fleet.ceilings

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End a stream that is still open and the worker threads, free pinned and device memory. Safe to call twice.

        Raises:
            PipelineError: a run is going on in another thread.
        """
        if not self.fleet.forked:
            if self._stream is not None:
                self._stream.end()
            elif self._turns:
                raise PipelineError("this Pipeline is running; close it when its run is done")
        self._closed = True
        self.fleet.close()

    @takes_options(ONE_RUN_OPTIONS)
    def run(self, source: Any, out: Any = None, **options: Any) -> Result:
        """Stream one dataset through the layer. Blocks until the result is complete.

        Args:
            source: (rows, in_features) of the layer's element type: a NumPy array or memmap of any strides and byte
                order, a torch CPU tensor (pinned memory is used in place, see `pin`), a CUDA tensor, the path of a
                .npy file, or an iterable of batches with any number of rows each.
            out: None (a new array or tensor of the source's kind comes back), an array or tensor
                (rows, out_features), also a CUDA tensor, or the path of a .npy file to write. A file appears under
                its name only when it is complete. Rows for an `np.memmap` are written to its file, where the space is
                reserved first; they are there, and in the map, when this returns, and on the disk after its flush().
            {options}

        Returns:
            A `Result` with `out` and `stats`.

        Raises:
            InputError, OutputError: source, out or trace can't be used; nothing has been written.
            DeviceError: a device failed.
            Exception: what the source or the sink raised, with a note that names the chunk and the stage.
        """
        called_s = time.perf_counter()
        with self._turn():
            return _run(self.fleet, source, out, self.fleet.options.with_values(options), called_s)

    def stream(self, batches: Iterable[Any]) -> Generator[Any, None, None]:
        """The layer's results of an iterable of batches, batch by batch and in order.

        Each result is a new array or tensor of the batches' kind with the batch's number of rows. A chunk never spans
        two batches, so a result comes as soon as its batch is done; batches of some hundred rows or more use a GPU
        well. At most a few batches are read ahead of the consumer. Closing the iterator early ends the run.

        Raises:
            InputError: a batch doesn't fit the layer. Exception: what the iterable raised.
        """
        with self._turn():
            self._stream = Stream(self.fleet, batches)
            try:
                yield from self._stream.results()
            finally:
                self._stream = None

    def _turn(self) -> Turn:
        if self._closed:
            raise PipelineError("this Pipeline is closed; make a new one")
        if self.fleet.forked:
            raise PipelineError(
                "this Pipeline was made before this process was forked; make a new one here, for GPUs in a process "
                "that is spawned instead (multiprocessing.get_context('spawn'))"
            )
        busy = "this Pipeline is running already; finish or close its stream first, or make a second Pipeline"
        return Turn(self._turns, busy)


def _run(fleet: Fleet, source: Any, out: Any, options: RunOptions, called_s: float) -> Result:
    """One run of a call at `called_s` on the clock of time.perf_counter, with its timeline written where the options
    ask for one."""
    if options.trace is not None:
        check_trace(options.trace)
    value, record = run_dataset(fleet, source, out, options, called_s)
    result = Result(value, functools.partial(stats_of, record))
    if options.trace is not None:
        _write_trace(options.trace, record, result)
    return result


def _write_trace(path: Any, record: Record, result: Result) -> None:
    try:
        write_trace(path, record.timeline(), result.stats.as_dict())
    except Exception as error:  # whatever it is, the result is complete and must reach the caller
        reason = str(error) if isinstance(error, PipelineError) else f"{path}: {error!r}"
        text = f"the run is complete, but its timeline isn't written: {reason}"
        warnings.warn(TraceWarning(text), stacklevel=5)


@takes_options(tuple(OPTIONS))
def run_pipelined(layer: Layer, source: Any, out: Any = None, **options: Any) -> Result:
    """Stream one dataset through the layer.

    What that takes is opened, and kept for the next call with the same layer, options and environment variables: see
    `release` for how long, and within which bounds.

    Args:
        layer, source, out: as those of `Pipeline` and `Pipeline.run`.
        {options}

    Returns:
        A `Result` with `out` and `stats`.

    Raises:
        InputError, OutputError, DeviceError: as `Pipeline` and `Pipeline.run`.
    """
    called_s = time.perf_counter()
    chosen = RunOptions(**options)
    with KEPT.lent(layer, chosen) as fleet:
        return _run(fleet, source, out, chosen, called_s)
