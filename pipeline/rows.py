"""Rows at a run's ends and in a device's memory, and what copy workers do with them.

Rows cross the bus in the wire's element type, which may be narrower than the source's or the result's: rows are cast
while they are copied to a piece of pinned memory (a fill) or from it (a drain).
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.arrays import HostArray
from pipeline.dtypes import Cast, DType

if TYPE_CHECKING:
    import torch

# -- rows --------------------------------------------------------------------------------------------------------------


HOST = -1  # the ordinal of rows in ordinary memory


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Rows in a device's memory already: first address and row stride in elements. `owner` keeps them alive.

    `ordinal` is the GPU's, or HOST.
    """

    ordinal: int
    address: int
    stride: int
    rows: int
    owner: Any

    def part(self, first: int, rows: int, itemsize: int) -> DeviceRows:
        return DeviceRows(self.ordinal, self.address + first * self.stride * itemsize, self.stride, rows, self.owner)

    def tensor(self, features: int, dtype: DType) -> torch.Tensor:
        """These rows (rows, features) as a torch tensor on the same memory, which `owner` must outlive."""
        import torch

        shape, strides = (self.rows, features), (self.stride, 1)
        elements = (self.rows - 1) * self.stride + features if self.rows else 0
        if elements == 0:
            return torch.empty(shape, dtype=getattr(torch, dtype.name), device=self._torch_device)
        if self.ordinal == HOST:
            memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(self.address)
            flat = torch.frombuffer(memory, dtype=getattr(torch, dtype.name))
        else:
            flat = torch.as_tensor(_CudaArray(self.address, elements * dtype.itemsize), device=self._torch_device)
            flat = flat.view(getattr(torch, dtype.name))
        return flat.as_strided(shape, strides)

    @property
    def _torch_device(self) -> str:
        return "cpu" if self.ordinal == HOST else f"cuda:{self.ordinal}"


class _CudaArray:
    """Bytes in a GPU's memory, as torch takes them."""

    def __init__(self, address: int, n_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (n_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows that code in C can move: each is contiguous and of native byte order, and `stride_bytes` lie from one to the
    next.

    They begin at `address` in memory, or at that position of the file `fd`, where each row follows the one before.
    `cast` is made on the way to a piece or from it. Memory that is `fresh` has never been written. `map_address` is
    where the file's first byte is mapped, if rows may be written through that map.
    """

    address: int
    stride_bytes: int
    fd: int | None = None
    cast: Cast | None = None
    fresh: bool = False
    map_address: int | None = None


class HostRows:
    """Some consecutive rows at one end of a run, outside the pinned ring. What a chunk's rows are at both ends."""

    array: HostArray | None = None
    """The rows as they lie in memory, where they are contiguous, of native byte order and of the wire's type: what copy
    engines may use in place."""

    @property
    def plain(self) -> PlainRows | None:
        """How code in C moves these rows; None where only `read` and `write` can."""
        return None

    def failure(self, code: int, position: int, end: int) -> Exception:
        """The exception of a copy in C that failed with an errno, or with -1 for a file that ended, at a `position` in
        the file. The copy was of rows before row `end` of these."""
        return OSError(code, os.strerror(code))


class SourceRows(HostRows, ABC):
    """Consecutive rows of a source."""

    @abstractmethod
    def read(self, first: int, piece: HostArray) -> None:
        """Copy rows [first, first + len(piece)) to `piece`, contiguous rows of the wire's type (as its carrier).
        Called from any thread, for several pieces at once."""


class TargetRows(HostRows, ABC):
    """Where consecutive rows of a result go."""

    @abstractmethod
    def write(self, first: int, piece: HostArray) -> None:
        """Store `piece`, contiguous rows of the wire's type (as its carrier), at rows [first, first + len(piece)).
        Called from any thread, for several pieces at once."""


# -- what copy workers do ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fill:
    """The job of reading rows [first, first + len(piece)) of `rows` into `piece`. Calling it does it."""

    rows: SourceRows
    first: int
    piece: HostArray

    def __call__(self) -> None:
        self.rows.read(self.first, self.piece)

    def failure(self, code: int, position: int) -> Exception:
        return self.rows.failure(code, position, self.first + len(self.piece))


@dataclass(slots=True)
class Drain:
    """The job of writing `piece` to rows [first, first + len(piece)) of `rows`. Calling it does it."""

    rows: TargetRows
    first: int
    piece: HostArray

    def __call__(self) -> None:
        self.rows.write(self.first, self.piece)

    def failure(self, code: int, position: int) -> Exception:
        return self.rows.failure(code, position, self.first + len(self.piece))


Job = Fill | Drain


class Operation(Protocol):
    """Something queued: a copy, a kernel, a worker's job."""

    def done(self) -> bool:
        """Whether it has completed. Raises what the operation itself raised."""

    def times(self) -> tuple[float, float]:
        """Start and end in seconds on the device's clock; only once it is done."""


class Workers(Protocol):
    """Threads that copy rows between the caller's memory or files and pinned pieces."""

    @property
    def description(self) -> str:
        """How many there are and what they are made of, for reports."""

    def submit(self, job: Job) -> Operation:
        """Queue `job`; jobs may run at the same time and finish in any order."""

    def run(self, job: Job) -> None:
        """Do `job` now and wait for it. Raises what it raises."""

    def wait_all(self) -> None:
        """Wait until every job that was submitted is done; what they raise is left to their operations."""

    def close(self) -> None:
        """Wait for the jobs and end the threads."""
