"""Files that appear under their name only when they are complete, whatever is in them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import OutputError, OutputExistsError
from pipeline.flow import Chunk, Sink
from pipeline.io.files import FileLayout, FileRows, disk_error
from pipeline.io.registry import SinkRequest
from pipeline.io.reservation import Reservation, check_uncut


class AtomicFile:
    """A file that is written beside its path as `<name>.partial` and gets its name when it is complete.

    End it by one of `finish`, `abort` and `leave`. `fd` may be written from any thread until then.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, reopen: bool = False) -> None:
        """Make the partial file, or with `reopen` open the one that an earlier run left.

        Raises:
            OutputExistsError: there is a partial file that isn't to be reopened.
            OutputError: it can't be made, or there is none to reopen.
        """
        self.path, self._overwrite = path, overwrite
        self.partial = path.with_name(path.name + ".partial")
        self._keep = False
        self._reservation: Reservation | None = None
        self.fd = self._reopened() if reopen else self._made()

    def _made(self) -> int:
        try:
            return os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise OutputExistsError(
                f"{self.partial} exists: another run is writing {self.path.name}, or one was killed; remove it if none "
                f"is"
            ) from None
        except OSError as error:
            raise OutputError(
                f"can't write {self.path}: no file can be made in its folder ({error.strerror}); choose a path that "
                f"can be written"
            ) from error

    def _reopened(self) -> int:
        try:
            status = os.stat(self.partial, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):  # before it is opened: that would wait for a pipe's reader
                raise OutputError(f"{self.partial} isn't a regular file, so no run left it; remove it and start again")
            return os.open(self.partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise OutputError(
                f"can't go on with {self.path}: {self.partial} can't be opened ({error.strerror}); start again"
            ) from error

    def check_size(self, expected: int) -> None:
        """Check the bytes of a file that was reopened.

        Raises:
            OutputError: it has more or fewer.
        """
        size = os.fstat(self.fd).st_size
        if size != expected:
            raise OutputError(
                f"{self.partial} has {size} bytes, expected {expected}, so another run left it; remove it and start "
                f"again"
            )

    def reserve(self, n_bytes: int) -> None:
        """Take the room of the first `n_bytes`, or in memory begin to. What they hold stays. Raises OutputError."""
        self._reservation = Reservation(self.fd, self.path, 0, n_bytes)

    def wait_for_room(self) -> None:
        """Wait until the room that was to be reserved is there. Raises OutputError: it won't be."""
        if self._reservation is not None:
            self._reservation.wait()

    def check_uncut(self, n_bytes: int) -> None:
        """Check that the first `n_bytes`, all of which were written, are still there. Raises OutputError."""
        check_uncut(self.fd, self.path, 0, n_bytes)

    def pwrite(self, data: bytes, position: int) -> None:
        """Write all of `data`. Raises OutputError."""
        rest = memoryview(data)
        try:
            while rest:
                written = os.pwrite(self.fd, rest, position)
                rest, position = rest[written:], position + written
        except OSError as error:
            raise disk_error(error, self.path) from error

    def sync(self) -> None:
        """Put what was written on disk. Raises OutputError: it may be lost, and isn't to be tried again."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def finish(self) -> Path:
        """Put the file on disk and give it its name. Returns its path.

        Raises:
            OutputExistsError: a file of that name appeared meanwhile. The partial file stays, complete.
            OutputError: the system refused.
        """
        self.sync()
        self._check_name()
        try:
            if self._overwrite:
                os.replace(self.partial, self.path)
            else:
                _rename_without_replacing(self.partial, self.path)
            _sync_folder(self.path.parent)
        except FileExistsError:
            self._keep = True
            raise OutputExistsError(
                f"{self.path} appeared during the run and was left as it is; the result is complete in "
                f"{self.partial}: move it to where it should be"
            ) from None
        except OSError as error:
            raise disk_error(error, self.path) from error
        self.leave()
        return self.path

    def _is_ours(self) -> bool:
        """Whether the partial file's name is still that of the open file."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.lstat(self.partial))
        except FileNotFoundError:
            return False

    def _check_name(self) -> None:
        if not self._is_ours():
            raise OutputError(
                f"{self.partial} was removed or replaced while it was written, so {self.path} can't be made of it; let "
                f"nothing else write to it, and start again"
            )

    def abort(self) -> None:
        """Remove the file, unless it is complete or was left. Safe to call at any time."""
        if self.fd < 0:
            return
        try:
            self._end_reservation()
            if not self._keep:
                if self._is_ours():  # somebody else's file may have its name
                    self.partial.unlink(missing_ok=True)
                if not os.fstat(self.fd).st_nlink:
                    os.ftruncate(self.fd, 0)  # an error's traceback may keep the file mapped, and so its room taken
        finally:
            self.leave()

    def leave(self) -> None:
        """Close the file as it is, to be reopened by a later run. Safe to call at any time."""
        if self.fd < 0:
            return
        try:
            self._end_reservation()
        finally:
            os.close(self.fd)
            self.fd = -1

    def _end_reservation(self) -> None:
        if self._reservation is not None:
            self._reservation.stop()


class AtomicFileSink(Sink):
    """Rows in order in a new file, behind a header of fixed length.

    `header` gives that of so many rows: the number is known at the end only where the source doesn't tell it.
    """

    where, resumable = "file", True

    def __init__(
        self,
        path: Path,
        request: SinkRequest,
        header: Callable[[int], bytes] = lambda rows: b"",
        *,
        swapped: bool = False,
    ) -> None:
        """`path` was checked by `check_path`. Elements are of foreign byte order where they are `swapped`."""
        self.cast, self._header = request.cast, header
        rows, features, itemsize = request.rows or 0, request.out_features, request.dtype.itemsize
        start, self._row_bytes = len(header(0)), features * itemsize
        n_bytes = start + rows * self._row_bytes
        self._file = AtomicFile(path, overwrite=request.overwrite, reopen=request.reopen)
        try:
            if request.reopen and request.rows is not None:
                self._file.check_size(n_bytes)
            fd = self._file.fd
            layout = FileLayout.in_order(fd, path, start, features, itemsize, swapped=swapped, reads=False)
            self._file.reserve(n_bytes)
            self._layout = layout.mapped(n_bytes) if rows else layout
            self._file.pwrite(header(rows), 0)
        except BaseException:
            if request.reopen:
                self._file.leave()
            else:
                self._file.abort()
            raise

    def prepare(self) -> None:
        self._file.wait_for_room()

    def target(self, chunk: Chunk) -> FileRows:
        return FileRows(self._layout, chunk.row, self.cast)

    def finish(self, rows: int) -> Any:
        self._file.check_uncut(self._layout.position + rows * self._row_bytes)
        self._file.pwrite(self._header(rows), 0)
        path = self._file.finish()
        self._layout = self._layout.unmapped()
        return path

    def abort(self) -> None:
        self._layout = self._layout.unmapped()
        self._file.abort()

    def leave(self) -> None:
        self._layout = self._layout.unmapped()
        self._file.leave()


def check_path(name: str, request: SinkRequest) -> Path:
    """Check that a new file may be made at the path `name`.

    Raises:
        OutputError, OutputExistsError: it mayn't: a directory, an existing file, a missing folder, the source itself.
    """
    path, source = Path(name), request.source
    if path.is_dir():
        raise OutputError(f"{path} is a directory, expected the path of a file to write")
    if os.path.lexists(path) and not request.overwrite:
        raise OutputExistsError(f"{path} exists; pass overwrite=True to replace it, or choose another path")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {str(path.parent)!r} of out {name!r} isn't a directory; create it first")
    if source.path is not None and path.exists() and path.samefile(source.path):
        raise OutputError(f"{path} is the source itself; choose another output path")
    return path


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
