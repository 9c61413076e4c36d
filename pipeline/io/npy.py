"""Files in NumPy's .npy format as sources and sinks, read with preadv and written with pwrite."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.arrays import HostArray
from pipeline.config import GIB, DType
from pipeline.errors import OutputError, OutputExistsError
from pipeline.io.jobs import Cast, Job, ReadJob, WriteJob, cast_between, disk_error
from pipeline.io.rows import Chunk, Feed, Gather, RangeFeed, Sink, Source

_HEADER_BYTES = 128  # of the files written


class FileRows:
    """Rows of a file, read with pread: no page is mapped, so resident memory stays flat."""

    def __init__(self, fd: int, offset: int, row_bytes: int, path: Path, cast: Cast | None) -> None:
        self.array: HostArray | None = None
        self._fd, self._offset, self._row_bytes, self._path, self._cast = fd, offset, row_bytes, path, cast

    def fill(self, first: int, piece: HostArray) -> Job:
        return ReadJob(piece, self._fd, self._offset + first * self._row_bytes, self._path, self._cast)


class NpyFileSource(Source):
    """A .npy file in C order and native byte order."""

    kind = ".npy file"

    def __init__(self, path: Path, shape: tuple[int, int], offset: int, dtype: DType) -> None:
        self.path: Path = path
        self.dtype, self.offset = dtype, offset
        self.rows, self.features = shape
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def feed(self, chunk_rows: int, gather: Gather, wire: DType) -> Feed:
        row_bytes, cast = self.features * self.dtype.itemsize, cast_between(self.dtype, wire)
        return RangeFeed(
            self.rows or 0,
            chunk_rows,
            lambda row, n: FileRows(self._fd, self.offset + row * row_bytes, row_bytes, self.path, cast),
        )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _npy_header(shape: tuple[int, int], dtype: DType) -> bytes:
    """A version 1.0 header of 128 bytes for any number of rows, so that it can be written again at the end.

    Format: numpy.lib.format.
    """
    fields = f"{{'descr': '{dtype.carrier.str}', 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


class FileTarget:
    """Rows of a file, written with pwrite."""

    def __init__(self, fd: int, offset: int, row_bytes: int, path: Path, cast: Cast | None) -> None:
        self.array: HostArray | None = None
        self._fd, self._offset, self._row_bytes, self._path, self._cast = fd, offset, row_bytes, path, cast

    def drain(self, first: int, piece: HostArray) -> Job:
        return WriteJob(piece, self._fd, self._offset + first * self._row_bytes, self._path, self._cast)


class NpyFileSink(Sink):
    """A new .npy file. It is written beside its path as `<name>.partial` and renamed when it is complete."""

    where = "file"

    def __init__(
        self, path: Path, rows: int | None, out_features: int, dtype: DType, wire: DType, overwrite: bool
    ) -> None:
        self._cast = cast_between(wire, dtype)
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
                f"can't write {path}: no file can be made in its folder ({error.strerror}); choose a path that can be "
                f"written"
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
        offset = _HEADER_BYTES + chunk.row * self._row_bytes
        return FileTarget(self._fd, offset, self._row_bytes, self._path, self._cast)

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
            raise disk_error(error, self._path) from error
        os.close(self._fd)
        self._fd = -1
        return self._path

    def abort(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._partial.unlink(missing_ok=True)


def _rename_without_replacing(old: Path, new: Path) -> None:
    """Give a file its final name.

    Raises:
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
