"""The pinned memory through which rows are staged between the caller's memory or files and a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.arrays import HostArray
from pipeline.config import debug
from pipeline.dtypes import DType

_ALIGNMENT_BYTES = 64  # a cache line: where pieces begin


class Ring:
    """Pinned pieces of one size in one direction: each holds up to `piece_rows` rows. Allocated together at first use.

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
        self._whole: HostArray | None = None
        self._memory: list[HostArray] = []  # by piece
        self._pieces: list[HostArray] = []  # the same as rows
        self._free: deque[int] = deque(range(pieces))
        self.poison = poison or debug()

    @property
    def allocated_bytes(self) -> int:
        return 0 if self._whole is None else self._whole.nbytes

    @property
    def available(self) -> bool:
        return bool(self._free)

    @property
    def free_pieces(self) -> list[int]:
        """The numbers of the pieces that nobody has taken."""
        return sorted(self._free)

    def take(self) -> int:
        """A free piece's number."""
        if not self._pieces:
            self._cut()
        return self._free.popleft()

    def _cut(self) -> None:
        """Allocate the memory, where an interrupted call hasn't, and cut it into pieces."""
        n_bytes = self.piece_rows * self.row_bytes
        step = -(-n_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if self._whole is None:
            self._whole = self._allocate(step * self.pieces)
        self._memory = [self._whole[i * step : i * step + n_bytes] for i in range(self.pieces)]
        shape = self.piece_rows, self.features
        self._pieces = [memory.view(self.dtype.carrier).reshape(shape) for memory in self._memory]

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
        if self._whole is not None:
            free(self._whole)
        self._whole, self._memory, self._pieces = None, [], []

    def give_back_all(self) -> None:
        """Every piece is free again: after an abort, once nothing uses them any more."""
        self._free = deque(range(self.pieces))


@dataclass(frozen=True)
class Rings:
    """The pieces of one mover, to the device and from it."""

    load: Ring
    store: Ring
