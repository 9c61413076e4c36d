"""Files in NumPy's .npy format as sinks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pipeline.dtypes import DType, cast_between
from pipeline.errors import OutputError, OutputExistsError
from pipeline.flow import Chunk, Sink
from pipeline.io.files import FileLayout, FileRows, disk_error, reserve

_HEADER_BYTES = 128  # of the files written


def _npy_header(shape: tuple[int, int], dtype: DType) -> bytes:
    """A version 1.0 header of 128 bytes for any number of rows, so that it can be written again at the end.

    Format: numpy.lib.format.
    """
    fields = f"{{'descr': '{dtype.carrier.str}', 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


class NpyFileSink(Sink):
    """A new .npy file. It is written beside its path as `<name>.partial` and renamed when it is complete."""

    where = "file"

    def __init__(
        self, path: Path, rows: int | None, out_features: int, dtype: DType, wire: DType, overwrite: bool
    ) -> None:
        self._cast = cast_between(wire, dtype)
        self._path, self._shape, self._dtype, self._overwrite = path, (rows, out_features), dtype, overwrite
        self._partial = path.with_name(path.name + ".partial")
        self._keep = False
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
        self._rows = FileLayout.in_order(self._fd, path, _HEADER_BYTES, out_features, dtype.itemsize, reads=False)
        try:
            reserve(self._fd, path, 0, _HEADER_BYTES + (rows or 0) * self._rows.strides[0])
            self._write_header(rows or 0)
        except BaseException:
            self.abort()
            raise

    def _write_header(self, rows: int) -> None:
        try:
            os.pwrite(self._fd, _npy_header((rows, self._shape[1]), self._dtype), 0)
        except OSError as error:
            raise disk_error(error, self._path) from error

    def target(self, chunk: Chunk) -> FileRows:
        return FileRows(self._rows, chunk.row, self._cast)

    def finish(self, rows: int) -> Path:
        self._write_header(rows)
        try:
            os.fsync(self._fd)
            if self._overwrite:
                os.replace(self._partial, self._path)
            else:
                _rename_without_replacing(self._partial, self._path)
            _sync_folder(self._path.parent)
        except FileExistsError:
            self._keep = True
            raise OutputExistsError(
                f"{self._path} appeared during the run and was left as it is; the result is complete in "
                f"{self._partial}: move it to where it should be"
            ) from None
        except OSError as error:
            raise disk_error(error, self._path) from error
        os.close(self._fd)
        self._fd = -1
        return self._path

    def abort(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not self._keep:
                self._partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, so that a new name outlives a loss of power. Where a file system can't or the
    folder may not be read, the system does it in its own time."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


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
