"""What lies behind an np.memmap: its file, read and written through a descriptor of our own, past the map.

Storing through a map ends the process (SIGBUS) where the disk is full or the file was cut, and pages that are read
through one count as the process's memory. All ways meet in the system's page cache: what one writes, the others read.
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.arrays import HostArray, address_of
from pipeline.dtypes import Cast, DType
from pipeline.errors import OptionError, OutputError
from pipeline.flow import Chunk, Sink, Source, Span
from pipeline.io.files import FileLayout, FileRows, FileSource, file_id, has_lines
from pipeline.io.reservation import Reservation, check_uncut


class MapSource(FileSource):
    """The file behind an np.memmap whose rows lie in one piece in it."""

    def __init__(self, layout: FileLayout, array: HostArray, dtype: DType) -> None:
        super().__init__("memory-mapped file", layout, (array.shape[0], array.shape[1]), dtype)
        self._array = array

    def spans(self) -> tuple[Span, ...]:
        return (Span.of_array(self._array), *super().spans())


def is_in_file(array: HostArray) -> bool:
    """Whether `array` lies in one piece in a file that it is mapped from: views with gaps are memory like any other.

    The map must be shared with the file: mode "c" has pages of its own.
    """
    whole = memmap_of(array)
    if whole is None or whole.mode == "c" or not array.size:
        return False
    return array.flags.c_contiguous or array.flags.f_contiguous


def open_map_source(array: HostArray, dtype: DType) -> MapSource | None:
    """The file behind `array`, which lies in one piece in it; None where it isn't found."""
    file = open_map(array)
    return None if file is None else MapSource(file.layout(array), array, dtype)


class MapSink(Sink):
    """The file behind a writable np.memmap of the caller's, who finds the rows in the map."""

    where, resumable = "file", True

    def __init__(self, value: Any, file: MappedFile, layout: FileLayout, cast: Cast | None) -> None:
        """`layout` is that of the rows in `file`, which is the sink's from here on. Raises OutputError."""
        self._value, self._file, self.cast, self._fd = value, file, cast, file.fd
        self._reservation = Reservation(file.fd, file.path, file.low, file.high)
        self._layout = layout.mapped(file.high)

    def prepare(self) -> None:
        self._reservation.wait()

    def target(self, chunk: Chunk) -> FileRows:
        return FileRows(self._layout, chunk.row, self.cast)

    def finish(self, rows: int) -> Any:
        check_uncut(self._fd, self._file.path, self._file.low, self._file.high)
        self.abort()
        return self._value

    def abort(self) -> None:
        if self._fd < 0:
            return
        self._layout = self._layout.unmapped()
        try:
            self._reservation.stop()
        finally:
            os.close(self._fd)
            self._fd = -1


def open_map_sink(out: Any, array: HostArray, source: Source, cast: Cast | None) -> MapSink:
    """The file behind `array`, a view of `out`'s memory, with the room for its rows taken.

    Raises:
        OptionError, OutputError: it can't be written past the map, or its bytes are the source's.
    """
    if not has_lines(array):
        raise OptionError(
            f"out maps a file and has strides {array.strides}, expected contiguous rows (the last stride "
            f"{array.itemsize}) or columns; pass an array in memory and copy it"
        )
    file = open_map(array, os.O_RDWR)
    if file is None:
        raise OutputError(
            "the file that out maps can't be opened for writing; pass its path, or an array in memory and copy it"
        )
    try:
        if any(file.span.overlaps(span) for span in source.spans()):
            raise OptionError(f"out maps the bytes of {file.path} that are the source; the layer can't run in place")
        return MapSink(out, file, file.layout(array, reads=False), cast)
    except BaseException:
        os.close(file.fd)
        raise


# -- which file it is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MappedFile:
    """The open file behind an array, and the positions in it of the array's first byte and the one after its last."""

    fd: int
    path: Path
    low: int
    high: int

    @property
    def span(self) -> Span:
        return Span(self.low, self.high, file_id(self.fd))

    def layout(self, array: HostArray, *, reads: bool = True) -> FileLayout:
        """Where the array's rows lie in it; `reads`: to be read, not written."""
        first = self.low + address_of(array) - np.lib.array_utils.byte_bounds(array)[0]
        return FileLayout.like(self.fd, self.path, first, array, reads=reads)


def memmap_of(array: HostArray) -> np.memmap[Any, Any] | None:
    """The np.memmap that an array is or is a view of; None for other memory."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and not isinstance(owner.base, mmap.mmap):
        owner = owner.base
    return owner if isinstance(owner, np.memmap) else None


def open_map(array: HostArray, flags: int = os.O_RDONLY) -> MappedFile | None:
    """Open the file behind a view of an np.memmap, whatever its name has become; None where it isn't found.

    The map itself holds a descriptor of its file. The one that has the map's inode is opened again, and is the right
    one if a page mapped from it shows the same device and inode in the system's list.
    """
    low, high = np.lib.array_utils.byte_bounds(array)
    mapped = _mapped_at(low)
    if mapped is None:
        return None
    file, position = mapped
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
            if not stat.S_ISREG(status.st_mode) or str(status.st_ino) != file[1]:
                continue
            path = Path(os.readlink(f"/proc/self/fd/{name}"))
            fd = os.open(f"/proc/self/fd/{name}", flags | os.O_CLOEXEC)
        except OSError:  # another thread has closed it, or it may not be opened so
            continue
        if _is_file(fd, file):
            return MappedFile(fd, path, position, position + high - low)
        os.close(fd)
    return None


def _is_file(fd: int, file: tuple[str, str]) -> bool:
    """NOTE: fstat's device isn't the one of the list on Btrfs and overlay file systems. A map of it gives the same."""
    try:
        with mmap.mmap(fd, 1, prot=mmap.PROT_READ) as page:
            page_bytes = np.frombuffer(page, np.uint8)
            mapped = _mapped_at(address_of(page_bytes))
            del page_bytes  # which the map can't be closed before
    except (OSError, ValueError):
        return False
    return mapped is not None and mapped[0] == file


def _mapped_at(address: int) -> tuple[tuple[str, str], int] | None:
    """The file that is mapped at an address, as device and inode, and the position there. Format: proc(5)."""
    try:
        with open("/proc/self/maps") as lines:
            for line in lines:
                span, _, offset, device, inode = line.split(maxsplit=5)[:5]
                first, end = (int(bound, 16) for bound in span.split("-"))
                if first <= address < end:
                    return (device, inode), int(offset, 16) + address - first
    except OSError:
        pass
    return None
