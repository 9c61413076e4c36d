"""Moves chunks piece by piece from Python: any rows, any device, any copy workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipeline.arrays import HostArray
from pipeline.devices.base import Device
from pipeline.instrument import Ranges, Recorder
from pipeline.rows import Drain, Fill, Operation, SourceRows, TargetRows, Workers
from pipeline.staging.in_place_mover import synchronize
from pipeline.staging.mover import Mover, Transfer
from pipeline.staging.ring import Ring, Rings


@dataclass(slots=True, eq=False)
class _ByPieces(Transfer):
    """A chunk that moves by pieces, each by two copies."""

    rows: Any  # SourceRows of a load, TargetRows of a store
    count: int
    slot: int
    chunk: int
    begun: int = 0  # rows whose first copy has begun
    passed_on: int = 0  # rows whose second copy has begun
    moved: int = 0
    pending: int = 0  # pieces of the ring in use
    copies: list[tuple[str, float, float, int]] = field(default_factory=list)  # stage, start, end, bytes
    failed_stage: str = ""
    error: Exception | None = None

    def fail(self, error: Exception, stage: str) -> None:
        if self.error is None:
            self.error, self.failed_stage = error, stage

    def queued(self) -> bool:
        return self.error is None and self.passed_on == self.count

    def done(self) -> bool:
        if self.error is not None and not self.pending:
            raise self.error
        return self.moved == self.count

    def record(self, recorder: Recorder) -> None:
        for stage, start_s, end_s, n_bytes in self.copies:
            recorder.add(stage, self.chunk, start_s, end_s, n_bytes)

    @property
    def end_s(self) -> float:
        return max(end_s for _, _, end_s, _ in self.copies)


@dataclass(slots=True, eq=False)
class _Piece:
    """Rows [first, first + rows) of a chunk in a piece of the ring, and the copy that is under way."""

    transfer: _ByPieces
    number: int
    first: int
    rows: int
    operation: Operation | None = None
    range: Any = None  # a profiler's, around work that other threads do


class _Direction(ABC):
    """One direction's ring, and its pieces on their way in the order in which they were begun.

    Each pass looks at the oldest piece in either stage only. A piece goes back to the ring when, and only when, the
    copy that uses it last says that it is done.
    """

    stages: tuple[str, str]  # what a piece's first copy is called, and its second

    def __init__(self, device: Device, workers: Workers, ring: Ring) -> None:
        self._device, self._workers, self._ring = device, workers, ring
        self.ranges = Ranges()
        self._waiting: deque[_ByPieces] = deque()  # chunks with rows whose first copy hasn't begun
        self._first: deque[_Piece] = deque()
        self._second: deque[_Piece] = deque()

    @abstractmethod
    def _begin_first(self, piece: _Piece, memory: HostArray) -> Operation: ...

    @abstractmethod
    def _begin_second(self, piece: _Piece, memory: HostArray) -> Operation: ...

    def add(self, transfer: _ByPieces) -> _ByPieces:
        self._waiting.append(transfer)
        return transfer

    def poll(self) -> bool:
        """Move all that can move, second copies first so that pieces come free."""
        moved = self._finish_second()
        moved |= self._finish_first()
        moved |= self._begin()
        return moved

    def _finish_second(self) -> bool:
        moved = False
        while self._second and self._is_over(self._second[0], self.stages[1]):
            piece = self._second.popleft()
            piece.transfer.moved += piece.rows
            self._leave(piece)
            moved = True
        return moved

    def _finish_first(self) -> bool:
        moved = False
        while self._first and self._is_over(self._first[0], self.stages[0]):
            piece = self._first.popleft()
            transfer, memory = piece.transfer, self._ring.rows(piece.number, piece.rows)
            try:
                if transfer.error is None:
                    piece.operation = self._begin_second(piece, memory)
                    self._second.append(piece)
                    transfer.passed_on += piece.rows
            except Exception as error:
                transfer.fail(error, self.stages[1])
            if transfer.error is not None:
                self._leave(piece)
            moved = True
        return moved

    def _begin(self) -> bool:
        """Begin the next pieces of the oldest chunk, as far as there is room in the ring."""
        moved = False
        while self._waiting and self._ring.available:
            transfer = self._waiting[0]
            if transfer.error is None:
                rows = min(self._ring.piece_rows, transfer.count - transfer.begun)
                piece = _Piece(transfer, self._ring.take(), transfer.begun, rows)
                transfer.begun += rows
                transfer.pending += 1
                try:
                    piece.operation = self._begin_first(piece, self._ring.rows(piece.number, rows))
                    self._first.append(piece)
                except Exception as error:
                    transfer.fail(error, self.stages[0])
                    self._leave(piece)
            if transfer.error is not None or transfer.begun == transfer.count:
                self._waiting.popleft()
            moved = True
        return moved

    def _is_over(self, piece: _Piece, stage: str) -> bool:
        """Whether a piece's copy has ended. Notes when it was made, or what it raised."""
        transfer, operation = piece.transfer, piece.operation
        assert operation is not None
        try:
            if not operation.done():
                return False
            transfer.copies.append((stage, *operation.times(), piece.rows * self._ring.row_bytes))
        except Exception as error:
            transfer.fail(error, stage)
        self._end_range(piece)
        return True

    def _leave(self, piece: _Piece) -> None:
        self._ring.give_back(piece.number)
        piece.transfer.pending -= 1

    def _end_range(self, piece: _Piece) -> None:
        if piece.range is not None:
            self.ranges.end(piece.range)
            piece.range = None

    def clear(self) -> None:
        """Take back all pieces, none of which is used any more."""
        for piece in (*self._first, *self._second):
            self._end_range(piece)
        self._waiting.clear()
        self._first.clear()
        self._second.clear()
        self._ring.give_back_all()


class _Loads(_Direction):
    stages = "fill", "H2D"

    def _begin_first(self, piece: _Piece, memory: HostArray) -> Operation:
        piece.range = self.ranges.begin("fill", piece.transfer.chunk)
        return self._workers.submit(Fill(piece.transfer.rows, piece.first, memory))

    def _begin_second(self, piece: _Piece, memory: HostArray) -> Operation:
        with self.ranges("H2D", piece.transfer.chunk):
            return self._device.upload(piece.transfer.slot, piece.first, memory)


class _Stores(_Direction):
    stages = "D2H", "drain"

    def _begin_first(self, piece: _Piece, memory: HostArray) -> Operation:
        with self.ranges("D2H", piece.transfer.chunk):
            return self._device.download(piece.transfer.slot, piece.first, memory)

    def _begin_second(self, piece: _Piece, memory: HostArray) -> Operation:
        piece.range = self.ranges.begin("drain", piece.transfer.chunk)
        return self._workers.submit(Drain(piece.transfer.rows, piece.first, memory))


class PythonMover(Mover):
    """Fills and drains by copy workers, H2D and D2H by the device, each begun in `poll`."""

    def __init__(self, device: Device, workers: Workers, rings: Rings) -> None:
        self._device, self._workers = device, workers
        self._loads, self._stores = _Loads(device, workers, rings.load), _Stores(device, workers, rings.store)

    def begin_run(self, ranges: Ranges) -> None:
        self._loads.ranges = self._stores.ranges = ranges

    def loads(self, rows: SourceRows) -> bool:
        return True

    def stores(self, rows: TargetRows) -> bool:
        return True

    def load(self, rows: SourceRows, count: int, slot: int, chunk: int) -> Transfer:
        return self._loads.add(_ByPieces(rows, count, slot, chunk))

    def store(self, rows: TargetRows, count: int, slot: int, chunk: int) -> Transfer:
        return self._stores.add(_ByPieces(rows, count, slot, chunk))

    def poll(self) -> bool:
        moved = self._stores.poll()
        moved |= self._loads.poll()
        return moved

    def cancel(self) -> None:
        synchronize(self._device)
        self._workers.wait_all()
        self._loads.clear()
        self._stores.clear()
