"""Room for a file's bytes, taken before they are written, so that a full disk shows before any work.

On a disk this is a note in the file system's books and done at once. In a file system in memory it is work, a page for
every 4 KiB, so a thread does it while devices are opened. Rows come when it is done: the system makes new pages and
hands out others several times more slowly at the same time than one after the other (docs/notes/formats.md).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from pipeline.config import GIB
from pipeline.errors import OutputError, uninterrupted

_STEP_BYTES = 16 << 20  # what is taken at once: who ends the thread waits for it
_IN_MEMORY = (0x01021994, 0x858458F6)  # tmpfs and ramfs, as <linux/magic.h> has them
_NOT_THERE = (errno.EOPNOTSUPP, errno.ENOSYS)
_BLOCK_BYTES = 512  # what st_blocks counts, whatever the file system's blocks are


class Reservation:
    """The room of bytes [first, end) of an open file. What the file holds stays, and it is not shorter afterwards.

    `stop` ends it.
    """

    def __init__(self, fd: int, path: Path, first: int, end: int) -> None:
        """Take the room, or in memory begin to. Messages name the file as `path`.

        Raises:
            OutputError: there isn't as much.
        """
        self._fd, self._path, self._first, self._end = fd, path, first, end
        self._taken_to = end  # bytes before this have their room
        self._error: OSError | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            if end > first:
                self._begin()
        except OSError as error:
            raise self._refusal(error) from error

    def _begin(self) -> None:
        status = os.fstat(self._fd)
        there_bytes = status.st_blocks * _BLOCK_BYTES  # wherever in the file
        if not is_in_memory(self._fd):
            if not fallocate(self._fd, self._first, self._end - self._first):
                self._check_free(there_bytes)
                self._lengthen(status)
            return
        self._check_free(there_bytes)
        self._lengthen(status)
        if there_bytes < max(status.st_size, self._end):  # the file has holes
            self._taken_to = self._first
            if not self._take_step(self._fd):
                self._taken_to = self._end  # ramfs: room can't be taken there, and is never short
            elif self._taken_to < self._end:
                self._start()

    def _check_free(self, there_bytes: int) -> None:
        """Check that what is missing is free. NOTE: file systems without a limit have 0 blocks."""
        room = os.fstatvfs(self._fd)
        if room.f_blocks and self._end - self._first - there_bytes > room.f_bavail * room.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _lengthen(self, status: os.stat_result) -> None:
        if status.st_size < self._end:
            os.ftruncate(self._fd, self._end)

    def _take_step(self, fd: int) -> bool:
        """Take the room of the next bytes. False where the file system doesn't take room."""
        until = min(self._taken_to + _STEP_BYTES, self._end)
        taken = fallocate(fd, self._taken_to, until - self._taken_to)
        self._taken_to = until
        return taken

    def _start(self) -> None:
        fd = os.dup(self._fd)  # an interrupt may lose this reservation, and then close the file before the thread ends
        self._thread = threading.Thread(target=self._take_all, args=(fd,), name="pipeline-reserve")
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no thread
            os.close(fd)
            raise
        except BaseException:  # an interrupt: the thread may have started all the same
            self.stop()
            raise

    def _take_all(self, fd: int) -> None:
        # NOTE: tmpfs gives up a step where a signal comes, and gives back what it took of it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while self._taken_to < self._end and not self._stopping.is_set():
                self._take_step(fd)
        except OSError as error:  # raised by wait()
            self._error = error
        finally:
            os.close(fd)

    def wait(self) -> None:
        """Wait until all room is taken.

        Raises:
            OutputError: there isn't as much as it was begun for.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._refusal(self._error) from self._error

    def stop(self) -> None:
        """Take no more, and end the thread. Safe to call at any time."""
        self._stopping.set()  # before the thread is looked for: one that is about to start does nothing then
        if self._thread is not None and self._thread.ident is not None:
            uninterrupted(self._thread.join)

    def _refusal(self, error: OSError) -> OutputError:
        gib, why = (self._end - self._first) / GIB, error.strerror
        return OutputError(f"can't reserve {gib:.2f} GiB for {self._path}: {why}; free space or choose another path")


def check_uncut(fd: int, path: Path, first: int, end: int) -> None:
    """Check that bytes [first, end) of an open file, all of which were written, are still there.

    In memory, a file that was cut and is long enough again has fewer pages. On a disk nothing tells for sure.

    Raises:
        OutputError: somebody cut the file.
    """
    status = os.fstat(fd)
    there_bytes = status.st_blocks * _BLOCK_BYTES
    if status.st_size < end or (there_bytes < end - first and is_in_memory(fd)):
        raise cut_error(path, status.st_size, end)


def cut_error(path: Path, size: int, expected: int) -> OutputError:
    """Somebody cut a file while it was written. `expected`: what it should be long at least."""
    return OutputError(
        f"writing {path} failed: somebody cut the file while it was written ({size} bytes long now, expected at least "
        f"{expected}); let nothing else write to it, and start again"
    )


# -- the system's calls, as far as `os` doesn't have them --------------------------------------------------------------


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, first: int, n_bytes: int) -> bool:
    """fallocate(2) of bytes [first, first + n_bytes). False where the file system has none.

    NOTE: `os.posix_fallocate` writes to every block there instead.
    """
    call = getattr(_libc(), "fallocate", None)
    if call is None:
        return False
    while call(fd, 0, ctypes.c_int64(first), ctypes.c_int64(n_bytes)):
        code = ctypes.get_errno()
        if code in _NOT_THERE:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def is_in_memory(fd: int) -> bool:
    """Whether an open file's file system keeps it in memory alone."""
    if sys.platform != "linux":
        return False
    status = ctypes.create_string_buffer(256)  # a struct statfs has 120 bytes, and begins with its type
    if _libc().fstatfs(fd, status):
        return False
    return ctypes.c_ulong.from_buffer(status).value in _IN_MEMORY
