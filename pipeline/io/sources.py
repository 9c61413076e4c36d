"""Where rows come from: arrays, tensors, .npy files and iterables of batches, cut into chunks.

A `Source` knows its element type and width before any row is read. Its feed hands out chunks to one or several
executors; a chunk's rows are then read from any thread.
"""

from __future__ import annotations

import io
import os
import queue
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.arrays import HostArray, byte_range, host_view, is_cuda, is_torch
from pipeline.config import DType, parse_dtype
from pipeline.devices.base import DeviceRows
from pipeline.errors import FileFormatError, InputError, PipelineError
from pipeline.forward import check_rows
from pipeline.layer import FusedLinear


class SourceRows(Protocol):
    """Some consecutive rows on the host."""

    array: HostArray | None
    """The rows as they lie in memory, where they are contiguous and native-endian."""

    def read(self, first: int, out: HostArray) -> None:
        """Copy rows [first, first + len(out)) to `out`. May be called from several threads."""


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


class ArrayRows:
    """Rows of an array of any strides and byte order."""

    def __init__(self, array: HostArray) -> None:
        self._array = array
        self.array = array if array.flags.c_contiguous and array.dtype.isnative else None

    def read(self, first: int, out: HostArray) -> None:
        np.copyto(out, self._array[first : first + len(out)])


class FileRows:
    """Rows of a file, read with pread: no page is mapped, so resident memory stays flat."""

    def __init__(self, fd: int, offset: int, row_bytes: int, path: Path) -> None:
        self.array: HostArray | None = None
        self._fd, self._offset, self._row_bytes, self._path = fd, offset, row_bytes, path

    def read(self, first: int, out: HostArray) -> None:
        buffer, position = memoryview(out.data).cast("B"), self._offset + first * self._row_bytes
        while buffer:
            got = os.preadv(self._fd, [buffer], position)
            if got == 0:
                raise FileFormatError(
                    f"{self._path} ended at byte {position}, {len(buffer)} bytes early: it was cut while it was read"
                )
            buffer, position = buffer[got:], position + got


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


class Source(ABC):
    """Rows of one element type and width."""

    rows: int | None  # None where only the end will tell
    features: int
    dtype: DType
    kind: str  # for messages and reports
    family: str = "numpy"  # what a new result should be: "numpy", "torch" or "cuda"
    numpy_dtype: np.dtype[Any] | None = None  # the caller's own NumPy type, where there is one

    @abstractmethod
    def feed(self, chunk_rows: int, buffers: Callable[[int], HostArray], depth: int) -> Feed:
        """The chunks. Sources that gather rows themselves take up to `depth` pinned chunk buffers from `buffers`."""

    def close(self) -> None:
        """Release files."""


class _RangeFeed(Feed):
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


class ArraySource(Source):
    """A NumPy array (memmaps too) or torch CPU tensor of shape (rows, features)."""

    def __init__(self, value: Any, kind: str) -> None:
        self.array, self.dtype = host_view(value, f"the source ({kind})")
        self.rows, self.features = self.array.shape
        self.kind = kind
        self.family = "torch" if is_torch(value) else "numpy"
        if self.family == "numpy":
            self.numpy_dtype = np.asanyarray(value).dtype.newbyteorder("=")

    def feed(self, chunk_rows: int, buffers: Callable[[int], HostArray], depth: int) -> Feed:
        return _RangeFeed(self.array.shape[0], chunk_rows, lambda row, n: ArrayRows(self.array[row : row + n]))


class CudaSource(Source):
    """A CUDA tensor of shape (rows, features): the kernel reads it where it is."""

    kind, family = "CUDA tensor", "cuda"

    def __init__(self, tensor: Any) -> None:
        self.dtype = parse_dtype(tensor.dtype, "the source's dtype")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise InputError(
                f"the source is a CUDA tensor with strides {tensor.stride()}, expected contiguous rows (the last "
                f"stride 1); use x.contiguous()"
            )
        self.tensor = tensor.detach()
        self.rows, self.features = self.tensor.shape
        self._all = DeviceRows(tensor.device.index, tensor.data_ptr(), tensor.stride(0), self.rows, self.tensor)

    def feed(self, chunk_rows: int, buffers: Callable[[int], HostArray], depth: int) -> Feed:
        itemsize = self.dtype.itemsize
        return _RangeFeed(self._all.rows, chunk_rows, lambda row, n: self._all.part(row, n, itemsize))


class NpyFileSource(Source):
    """A .npy file in C order and native byte order."""

    kind = ".npy file"

    def __init__(self, path: Path, shape: tuple[int, int], offset: int, dtype: DType) -> None:
        self.path, self.dtype, self.offset = path, dtype, offset
        self.rows, self.features = shape
        self.numpy_dtype = dtype.carrier
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def feed(self, chunk_rows: int, buffers: Callable[[int], HostArray], depth: int) -> Feed:
        row_bytes = self.features * self.dtype.itemsize
        return _RangeFeed(
            self.rows or 0,
            chunk_rows,
            lambda row, n: FileRows(self._fd, self.offset + row * row_bytes, row_bytes, self.path),
        )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_MAX_HEADER_BYTES = 16_384  # NumPy reads no header of more than 10,000 characters


def open_npy(path: Path, in_features: int) -> Source:
    """The source of a .npy file. Fortran order and foreign byte order are converted while they are read.

    Raises:
        FileNotFoundError, PermissionError: from opening it.
        FileFormatError: not a .npy file, object elements, or its size isn't what the header says.
        ShapeError, DTypeError
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"source {str(path)!r} isn't a regular file, expected a .npy file")
    size = status.st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_MAX_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"format version {version}")
        shape, fortran, dtype = read_header[version](head)
    except Exception as error:  # NumPy's parser lets many kinds through: TokenError, RecursionError, TypeError, ...
        raise FileFormatError(f"{path} isn't a readable .npy file: {error}; write it with np.save") from error
    offset = head.tell()
    if dtype.hasobject:
        raise FileFormatError(
            f"{path} holds Python objects, expected floating-point numbers; convert and save it again"
        )
    element = parse_dtype(dtype.newbyteorder("="), f"the element type of {path}")
    check_rows(shape, in_features, f"the array in {path}")
    expected = offset + shape[0] * shape[1] * dtype.itemsize
    if size != expected:
        state = "truncated" if size < expected else "followed by other data"
        raise FileFormatError(f"{path} is {state}: {size} bytes, its header promises {expected} for shape {shape}")
    if fortran or not dtype.isnative or 0 in shape:
        array = np.load(path, mmap_mode="r" if 0 not in shape else None, allow_pickle=False)
        return ArraySource(array, ".npy file" + (" in Fortran order" if fortran else ""))
    return NpyFileSource(path, (shape[0], shape[1]), offset, element)


class BatchSource(Source):
    """An iterable of batches: NumPy arrays or torch CPU tensors of shape (any number of rows, features).

    A thread pulls the batches and gathers their rows into pinned chunk buffers, so a batch's memory may be used again
    by the iterable as soon as the next one is asked for. At most `depth` chunks are read ahead.
    """

    kind, rows = "iterable of batches", None

    def __init__(
        self, batches: Iterable[Any], layer: FusedLinear, on_batch: Callable[[int], BatchResult | None] | None
    ) -> None:
        self._layer, self.on_batch = layer, on_batch
        self._batches = iter(batches)
        self._first: list[Any] = []
        self.features, self.dtype = layer.in_features, layer.dtype
        for batch in self._batches:
            self._first = [batch]
            self._check(batch, 0)
            self.family = "torch" if is_torch(batch) else "numpy"
            if self.family == "numpy":
                self.numpy_dtype = np.asanyarray(batch).dtype.newbyteorder("=")
            break

    def _check(self, batch: Any, number: int) -> HostArray:
        what = f"batch {number}"
        if not (is_torch(batch) or hasattr(batch, "__array__")):
            raise InputError(
                f"{what} is a {type(batch).__name__}, expected a NumPy array or torch tensor of rows; yield the rows "
                f"alone, for example (x for x, _ in loader)"
            )
        if is_cuda(batch):
            raise InputError(f"{what} is a CUDA tensor, expected host memory; pass the whole CUDA tensor as the source")
        array, dtype = host_view(batch, what)
        check_rows(array.shape, self._layer.in_features, what)
        self._layer.check_dtype(dtype, what)
        return array

    def feed(self, chunk_rows: int, buffers: Callable[[int], HostArray], depth: int) -> Feed:
        return _BatchFeed(self, chunk_rows, buffers, depth)

    def arrays(self) -> Iterator[HostArray]:
        """Each batch, checked, as an array."""
        number = 0
        while self._first:
            yield self._check(self._first.pop(), number)
            number += 1
            for batch in self._batches:
                self._first.append(batch)
                break


@dataclass
class _Filling:
    """The chunk that is being gathered."""

    index: int
    row: int
    buffer: HostArray
    start_s: float
    rows: int = 0


@dataclass
class _BatchFeed(Feed):
    source: BatchSource
    chunk_rows: int
    buffers: Callable[[int], HostArray]
    depth: int
    _ready: queue.SimpleQueue[Chunk] = field(default_factory=queue.SimpleQueue)
    _free: queue.SimpleQueue[HostArray | None] = field(default_factory=queue.SimpleQueue)
    _error: BaseException | None = None
    _finished: bool = False
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._allocated = 0
        self._next = (0, 0)  # index and row of the next chunk
        self._thread = threading.Thread(target=self._read, name="pipeline-reader", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            filling: _Filling | None = None
            try:
                for batch in self.source.arrays():
                    if self._stopping:  # the chunk buffers may belong to the next run by now
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
            if filling is None:
                buffer = self._buffer()
                if buffer is None:
                    return None
                filling = _Filling(*self._next, buffer, time.perf_counter())
            rows = min(len(batch) - at, self.chunk_rows - filling.rows)
            np.copyto(filling.buffer[filling.rows : filling.rows + rows], batch[at : at + rows])
            filling.rows += rows
            at += rows
            if filling.rows == self.chunk_rows or (result is not None and at == len(batch)):
                self._emit(filling, result, at - filling.rows)
                filling = None
        return filling

    def _emit(self, filling: _Filling, batch: BatchResult | None = None, batch_row: int = 0) -> None:
        rows = ArrayRows(filling.buffer[: filling.rows])
        self._next = (filling.index + 1, filling.row + filling.rows)
        buffer = filling.buffer
        self._ready.put(
            Chunk(
                filling.index,
                filling.row,
                filling.rows,
                rows,
                release=lambda: self._free.put(buffer),
                filled=(filling.start_s, time.perf_counter()),
                batch=batch,
                batch_row=batch_row,
            )
        )

    def _buffer(self) -> HostArray | None:
        """A free chunk buffer; None once the run stops."""
        if self._allocated < self.depth:
            self._allocated += 1
            dtype, features = self.source.dtype, self.source.features
            memory = self.buffers(self.chunk_rows * features * dtype.itemsize)
            return memory.view(dtype.carrier).reshape(self.chunk_rows, features)
        return None if self._stopping else self._free.get()

    def take(self) -> Chunk | None:
        with self._lock:
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
        self._thread.join(timeout=5.0)
        if self._thread.is_alive():
            raise PipelineError(
                "the source iterable hasn't returned for 5 s after the run stopped, so its reader thread is left "
                "behind; let the iterable end or raise when its own input stops"
            )


def open_source(value: Any, layer: FusedLinear, on_batch: Callable[[int], BatchResult | None] | None = None) -> Source:
    """The source that `value` stands for, checked against the layer.

    Raises:
        ShapeError, DTypeError, FileFormatError, InputError: it can't be streamed through this layer.
    """
    source: Source
    if isinstance(value, (str, os.PathLike)):
        path = Path(value)
        if path.suffix != ".npy":
            raise InputError(f"source {str(path)!r} isn't a .npy file; save the array with np.save, or pass it itself")
        source = open_npy(path, layer.in_features)
    elif is_torch(value) or isinstance(value, np.ndarray):
        check_rows(tuple(value.shape), layer.in_features, "the source")
        if is_cuda(value):
            source = CudaSource(value)
        else:
            source = ArraySource(value, "torch tensor" if is_torch(value) else "NumPy array")
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray, dict, set)):
        source = BatchSource(value, layer, on_batch)
    else:
        raise InputError(
            f"source is a {type(value).__name__}, expected a NumPy array, a torch tensor, the path of a .npy file or "
            f"an iterable of batches"
        )
    try:
        layer.check_dtype(source.dtype, f"the source ({source.kind})")
    except InputError:
        source.close()
        raise
    return source


def source_bytes(source: Source) -> tuple[int, int] | None:
    """The addresses of a source's memory, first and one after last; None where it has none."""
    if isinstance(source, ArraySource):
        low, high = np.lib.array_utils.byte_bounds(source.array)
        return (low, high)
    if isinstance(source, CudaSource):
        return byte_range(source.tensor)
    return None


def source_file(source: Source) -> tuple[Path, int, int] | None:
    """The file that holds a source's rows, and the positions of its first byte and the one after its last."""
    if isinstance(source, NpyFileSource):
        return source.path, source.offset, source.offset + (source.rows or 0) * source.features * source.dtype.itemsize
    return mapped_file(source.array) if isinstance(source, ArraySource) else None


def mapped_file(array: HostArray) -> tuple[Path, int, int] | None:
    """The same of an array that is, or is a view of, a np.memmap; None for other memory."""
    whole: np.memmap[Any, Any] | None = None
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap) and owner.filename is not None:
            whole = owner
        owner = owner.base
    if whole is None:
        return None
    low, high = np.lib.array_utils.byte_bounds(array)
    shift = whole.offset - np.lib.array_utils.byte_bounds(whole)[0]
    return Path(str(whole.filename)), low + shift, high + shift
