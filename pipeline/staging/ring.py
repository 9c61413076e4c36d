"""The pinned memory through which rows are staged between the caller's memory or files and a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.arrays import HostArray
from pipeline.config import debug
from pipeline.dtypes import DType


class Ring:
    """Pinned pieces of one size in one direction: each holds up to `piece_rows` rows. Allocated at first use.

    With `poison`, or the environment variable PIPELINE_DEBUG set, a piece is overwritten with NaN bytes when it is
    given back, so that a copy which still reads it shows in the result.
    """

    def __init__(
        self,
        allocate: Callable[[int], HostArray],
        pieces: int,
        piece_bytes: int,
        features: int,
        dtype: DType,
        *,
        poison: bool = False,
    ) -> None:
        self.row_bytes = features * dtype.itemsize
        self.piece_rows = max(1, piece_bytes // self.row_bytes)
        self.pieces, self.features = pieces, features
        self._allocate, self.dtype = allocate, dtype
        self._memory: list[HostArray] = []
        self._pieces: list[HostArray] = []  # the same as rows
        self._free: deque[int] = deque(range(pieces))
        self.poison = poison or debug()

    @property
    def allocated_bytes(self) -> int:
        return len(self._memory) * self.piece_rows * self.row_bytes

    @property
    def available(self) -> bool:
        return bool(self._free)

    @property
    def free_pieces(self) -> list[int]:
        """The numbers of the pieces that nobody has taken."""
        return sorted(self._free)

    def take(self) -> int:
        """A free piece's number."""
        while len(self._pieces) < self.pieces:  # none is lost where an allocation fails or is interrupted
            if len(self._memory) == len(self._pieces):
                self._memory.append(self._allocate(self.piece_rows * self.row_bytes))
            rows = self._memory[len(self._pieces)].view(self.dtype.carrier)
            self._pieces.append(rows.reshape((self.piece_rows, self.features)))
        return self._free.popleft()

    def take_all(self) -> list[HostArray]:
        """The memory of all pieces, none of which is free then."""
        while self.available:
            self.take()
        return self._memory

    def rows(self, piece: int, rows: int) -> HostArray:
        """The piece's first `rows` rows as an array (rows, features) in the carrier type."""
        whole = self._pieces[piece]
        return whole if rows == self.piece_rows else whole[:rows]

    def give_back(self, piece: int) -> None:
        if self.poison:
            self._memory[piece][:] = 0xFF
        self._free.append(piece)

    def free(self, free: Callable[[HostArray], None]) -> None:
        """Free the memory with `free`. Nothing may be using a piece, now or later."""
        for memory in self._memory:
            free(memory)
        self._memory, self._pieces = [], []

    def give_back_all(self) -> None:
        """Every piece is free again: after an abort, once nothing uses them any more."""
        self._free = deque(range(self.pieces))


@dataclass(frozen=True)
class Rings:
    """The pieces of one mover, to the device and from it."""

    load: Ring
    store: Ring
