"""Where rows go: arrays, tensors, .npy files, and the batches of a stream.

A sink knows its shape before the run or learns it at the end. Rows are written from any thread, each row once.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.arrays import HostArray, host_tensor, host_view, is_cuda, is_torch, overlaps
from pipeline.config import GIB, DType, parse_dtype
from pipeline.devices.base import DeviceRows
from pipeline.errors import DTypeError, OptionError, OutputError, OutputExistsError, PipelineError
from pipeline.forward import check_gpu_out, check_out
from pipeline.io.sources import BatchResult, Chunk, CudaSource, Source, mapped_file, source_bytes, source_file
from pipeline.layer import FusedLinear


class TargetRows(Protocol):
    """Where a chunk's rows go on the host."""

    array: HostArray | None
    """The memory itself, where it is contiguous and native-endian."""

    def write(self, first: int, rows: HostArray) -> None:
        """Store `rows` at rows [first, first + len(rows)) of the chunk. May be called from several threads."""


class ArrayTarget:
    """Rows of an array of any strides and byte order."""

    def __init__(self, array: HostArray) -> None:
        self._array = array
        self.array = array if array.flags.c_contiguous and array.dtype.isnative else None

    def write(self, first: int, rows: HostArray) -> None:
        np.copyto(self._array[first : first + len(rows)], rows)


class FileTarget:
    """Rows of a file, written with pwrite."""

    def __init__(self, fd: int, offset: int, row_bytes: int, path: Path) -> None:
        self.array: HostArray | None = None
        self._fd, self._offset, self._row_bytes, self._path = fd, offset, row_bytes, path

    def write(self, first: int, rows: HostArray) -> None:
        buffer, position = memoryview(rows.data).cast("B"), self._offset + first * self._row_bytes
        while buffer:
            try:
                written = os.pwrite(self._fd, buffer, position)
            except OSError as error:
                raise _disk_error(error, self._path) from error
            buffer, position = buffer[written:], position + written


def _disk_error(error: OSError, path: Path) -> OutputError:
    return OutputError(f"writing {path} failed: {error.strerror}; free space or choose another path, nothing was kept")


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


class ArraySink(Sink):
    """An array or CPU tensor of the caller's, or a new one."""

    def __init__(self, value: Any, array: HostArray) -> None:
        self._value, self._array = value, array

    def target(self, chunk: Chunk) -> ArrayTarget:
        return ArrayTarget(self._array[chunk.row : chunk.row + chunk.rows])

    def finish(self, rows: int) -> Any:
        return self._value


class GrowingSink(Sink):
    """A new array for a source that doesn't know its length: a block a chunk, joined at the end."""

    def __init__(self, out_features: int, dtype: DType, wrap: Any) -> None:
        self._features, self._dtype, self._wrap = out_features, dtype, wrap
        self._blocks: dict[int, HostArray] = {}

    def target(self, chunk: Chunk) -> ArrayTarget:
        block = self._blocks[chunk.row] = np.empty((chunk.rows, self._features), self._dtype.carrier)
        return ArrayTarget(block)

    def finish(self, rows: int) -> Any:
        whole = np.empty((rows, self._features), self._dtype.carrier)
        for row in sorted(self._blocks):  # each block is freed as soon as it is copied: no second copy of it all
            block = self._blocks.pop(row)
            whole[row : row + len(block)] = block
        return self._wrap(whole)


class CudaSink(Sink):
    """A CUDA tensor, written by the kernel itself."""

    def __init__(self, tensor: Any, dtype: DType) -> None:
        self._tensor, self._itemsize = tensor, dtype.itemsize
        self._all = DeviceRows(tensor.device.index, tensor.data_ptr(), tensor.stride(0), tensor.shape[0], tensor)

    def target(self, chunk: Chunk) -> DeviceRows:
        return self._all.part(chunk.row, chunk.rows, self._itemsize)

    def finish(self, rows: int) -> Any:
        return self._tensor


class BatchSink(Sink):
    """The results of a stream's batches, handed to a consumer in order while the run goes on in another thread.

    At most `limit` batches are anywhere between the source and the consumer.
    """

    def __init__(self, out_features: int, dtype: DType, limit: int) -> None:
        self._features, self._dtype, self._limit = out_features, dtype, limit
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

    def target(self, chunk: Chunk) -> ArrayTarget:
        if chunk.batch is None:
            raise PipelineError("a stream's chunk belongs to no batch")
        return ArrayTarget(chunk.batch.array[chunk.batch_row : chunk.batch_row + chunk.rows])

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


_HEADER_BYTES = 128


def _npy_header(shape: tuple[int, int], dtype: DType) -> bytes:
    """A version 1.0 header of 128 bytes for any number of rows, so that it can be written again at the end.

    Format: numpy.lib.format.
    """
    fields = f"{{'descr': '{dtype.carrier.str}', 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


class NpyFileSink(Sink):
    """A new .npy file. It is written beside its path as `<name>.partial` and renamed when it is complete."""

    def __init__(self, path: Path, rows: int | None, out_features: int, dtype: DType, overwrite: bool) -> None:
        self._path, self._shape, self._dtype, self._overwrite = path, (rows, out_features), dtype, overwrite
        self._partial = path.with_name(path.name + ".partial")
        self._row_bytes = out_features * dtype.itemsize
        try:
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise OutputExistsError(
                f"{self._partial} exists: another run is writing {path.name}, or one was killed; remove it if none is"
            ) from None
        except OSError as error:
            raise OutputError(
                f"can't create {self._partial}: {error.strerror}; choose a path that can be written"
            ) from error
        try:
            self._reserve(rows or 0)
        except BaseException:
            self.abort()
            raise

    def _reserve(self, rows: int) -> None:
        """Take the disk space now, so that a full disk shows before any work."""
        n_bytes = _HEADER_BYTES + rows * self._row_bytes
        try:
            os.posix_fallocate(self._fd, 0, n_bytes)
            os.pwrite(self._fd, _npy_header((rows, self._shape[1]), self._dtype), 0)
        except OSError as error:
            raise OutputError(
                f"can't reserve {n_bytes / GIB:.2f} GiB for {self._path}: {error.strerror}; free space or choose "
                f"another path"
            ) from error

    def target(self, chunk: Chunk) -> FileTarget:
        return FileTarget(self._fd, _HEADER_BYTES + chunk.row * self._row_bytes, self._row_bytes, self._path)

    def finish(self, rows: int) -> Path:
        try:
            os.pwrite(self._fd, _npy_header((rows, self._shape[1]), self._dtype), 0)
            os.fsync(self._fd)
            if self._overwrite:
                os.replace(self._partial, self._path)
            else:
                _rename_without_replacing(self._partial, self._path)
        except FileExistsError:
            raise OutputExistsError(f"{self._path} appeared during the run; it was left as it is") from None
        except OSError as error:
            raise _disk_error(error, self._path) from error
        os.close(self._fd)
        self._fd = -1
        return self._path

    def abort(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._partial.unlink(missing_ok=True)


def _rename_without_replacing(old: Path, new: Path) -> None:
    """Raises:
    FileExistsError: `new` exists.
    """
    try:
        os.link(old, new)  # unlike rename, never replaces a file that appeared meanwhile
    except FileExistsError:
        raise
    except OSError:  # no hard links here: FAT, some network file systems
        if os.path.lexists(new):
            raise FileExistsError(f"{new} exists") from None
        os.rename(old, new)
    else:
        os.unlink(old)


def open_sink(
    out: Any, source: Source, layer: FusedLinear, out_dtype: DType | None, overwrite: bool
) -> tuple[Sink, DType]:
    """The sink that `out` stands for, checked against source and layer, and the element type of the result.

    `out_dtype` None means the source's. Nothing is created if a check fails.

    Raises:
        ShapeError, DTypeError, OptionError, OutputError, OutputExistsError
    """
    dtype = out_dtype or source.dtype
    if isinstance(out, (str, os.PathLike)):
        return _open_file(Path(out), source, layer, dtype, overwrite), dtype
    if out is None:
        return _new_result(source, layer, dtype), dtype
    if not (is_torch(out) or isinstance(out, np.ndarray)):
        raise OptionError(
            f"out is a {type(out).__name__}, expected None, a NumPy array, a torch tensor or the path of a .npy file"
        )
    if source.rows is None:
        raise OptionError(
            f"out is an array, but the source ({source.kind}) doesn't know its number of rows; leave out=None, give a "
            f"path, or use Pipeline.stream"
        )
    if is_cuda(out) != isinstance(source, CudaSource):
        raise OptionError("a CUDA tensor can be the source only together with a CUDA tensor as out (or out=None)")
    check_out(tuple(out.shape), (source.rows, layer.out_features))
    if isinstance(source, CudaSource):
        check_gpu_out(source.tensor, out, layer.out_features)
        _check_out_dtype(parse_dtype(out.dtype, "out dtype"), dtype)
        return CudaSink(out, dtype), dtype
    array, array_dtype = host_view(out, "out")
    _check_out_dtype(array_dtype, dtype)
    if not array.flags.writeable:
        raise OptionError("out is read-only; pass an array that can be written")
    if array.size and any(size > 1 and stride == 0 for size, stride in zip(array.shape, array.strides, strict=True)):
        raise OptionError(f"out has strides {array.strides}: its rows or columns share memory; pass a real array")
    addresses = source_bytes(source)
    if addresses is not None and overlaps(addresses, np.lib.array_utils.byte_bounds(array)):
        raise OptionError("out overlaps the source; pass other memory, the layer can't run in place")
    read, written = source_file(source), mapped_file(array)
    if read and written and overlaps(read[1:], written[1:]) and os.path.samefile(read[0], written[0]):
        raise OptionError(f"out maps the bytes of {read[0]} that are the source; the layer can't run in place")
    return ArraySink(out, array), dtype


def _check_out_dtype(got: DType, expected: DType) -> None:
    if got is not expected:
        raise DTypeError(f"out is {got}, the result is {expected}; pass out_dtype='{got}' to have it rounded to that")


def _open_file(path: Path, source: Source, layer: FusedLinear, dtype: DType, overwrite: bool) -> Sink:
    if path.suffix != ".npy":
        raise OptionError(f"out {str(path)!r} doesn't end in .npy, the only file format written")
    if dtype.name == "bfloat16":
        raise DTypeError("a .npy file can't hold bfloat16; pass out_dtype='float32' or 'float16'")
    if source.family == "cuda":
        raise OptionError("a CUDA tensor's result can't be streamed to a file; pass the tensor's .cpu() as the source")
    if path.is_dir():
        raise OutputError(f"{path} is a directory, expected the path of a file to write")
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(f"{path} exists; pass overwrite=True to replace it, or choose another path")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} isn't a directory; create it first")
    source_path = getattr(source, "path", None)
    if source_path is not None and path.exists() and path.samefile(source_path):
        raise OutputError(f"{path} is the source itself; choose another output path")
    return NpyFileSink(path, source.rows, layer.out_features, dtype, overwrite)


def _new_result(source: Source, layer: FusedLinear, dtype: DType) -> Sink:
    if isinstance(source, CudaSource):
        import torch

        device, shape = source.tensor.device, (len(source.tensor), layer.out_features)
        return CudaSink(torch.empty(shape, dtype=getattr(torch, dtype.name), device=device), dtype)
    wrap = wrapper(source, dtype)
    if source.rows is None:
        return GrowingSink(layer.out_features, dtype, wrap)
    array = np.empty((source.rows, layer.out_features), dtype.carrier)
    return ArraySink(wrap(array), array)


def wrapper(source: Source, dtype: DType) -> Any:
    """The function that turns a result in its carrier type into what the caller of this source expects.

    Raises:
        DTypeError: a bfloat16 NumPy result without the ml_dtypes package.
    """
    if source.family == "torch":
        return lambda array: host_tensor(array, dtype)
    if dtype.name != "bfloat16":
        return lambda array: array
    try:
        import ml_dtypes
    except ImportError:
        raise DTypeError(
            "NumPy has no bfloat16 for the result; pass torch tensors, install ml_dtypes, or choose another out_dtype"
        ) from None
    return lambda array: array.view(ml_dtypes.bfloat16)
