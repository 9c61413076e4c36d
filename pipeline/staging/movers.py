"""The movers of one device, with their rings, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.arrays import HostArray
from pipeline.config import Staging
from pipeline.devices.base import Device
from pipeline.dtypes import DType
from pipeline.instrument import Ranges
from pipeline.rows import SourceRows, TargetRows, Workers
from pipeline.staging.in_place_mover import InPlaceMover, synchronize
from pipeline.staging.mover import Mover
from pipeline.staging.native_mover import open_native_mover
from pipeline.staging.python_mover import PythonMover
from pipeline.staging.ring import Ring, Rings


@dataclass(frozen=True)
class Wire:
    """Rows as they cross the bus."""

    in_features: int
    out_features: int
    dtype: DType  # what rows to the device are made of
    out_dtype: DType  # what rows from the device are made of

    @property
    def in_row_bytes(self) -> int:
        return self.in_features * self.dtype.itemsize

    @property
    def out_row_bytes(self) -> int:
        return self.out_features * self.out_dtype.itemsize


class Movers:
    """What moves rows between the host and one prepared and allocated device; stays warm between runs.

    Rows that copy engines can use where they are go in one copy. Others are staged through pinned pieces: by code in C
    where it can move them, by Python elsewhere. Pieces are allocated when they are first needed.

    One run at a time uses the movers, between `begin` and `end`.
    """

    def __init__(
        self,
        device: Device,
        workers: Workers,
        wire: Wire,
        staging: Staging,
        pinned: Callable[[int], HostArray] | None = None,
    ) -> None:
        """`wire` is the prepared device's. `pinned` allocates the pieces, by itself the device does."""
        self._device, self.wire, self._pinned = device, wire, pinned or device.pinned
        self.in_use = False  # a second interrupt can end a run before it has given the pieces back
        self._set_up(workers, staging)

    def _set_up(self, workers: Workers, staging: Staging) -> None:
        self._workers, self._staging = workers, staging
        self.rings = {"native": self._new_rings(), "Python": self._new_rings()}  # by what moves rows through them
        self._movers: list[Mover] = []  # the first one that can carry a chunk does

    def _new_rings(self) -> Rings:
        wire, staging = self.wire, self._staging

        def ring(features: int, dtype: DType) -> Ring:
            pieces, size = staging.ring_pieces, staging.piece_bytes
            return Ring(self._pinned, pieces, size, features, dtype, poison=self._device.poison)

        return Rings(ring(wire.in_features, wire.dtype), ring(wire.out_features, wire.out_dtype))

    def begin(self, ranges: Ranges) -> None:
        """Before a run, in its thread. Gives up what an interrupted run may have left under way."""
        if self.in_use:
            self.cancel()
        if not self._movers:
            native = open_native_mover(self._device, self._workers, self.rings["native"], ranges)
            in_place = InPlaceMover(self._device, self.wire.in_row_bytes, self.wire.out_row_bytes)
            python = PythonMover(self._device, self._workers, self.rings["Python"])
            self._movers = [in_place, *([] if native is None else [native]), python]
        for mover in self._movers:
            mover.begin_run(ranges)
        self.in_use = True

    def end(self) -> None:
        """After a run whose transfers are all done."""
        self.in_use = False

    def for_load(self, rows: SourceRows) -> Mover:
        """What carries a chunk of these rows to the device."""
        return next(mover for mover in self._movers if mover.loads(rows))

    def for_store(self, rows: TargetRows) -> Mover:
        """What carries a chunk's results to these rows."""
        return next(mover for mover in self._movers if mover.stores(rows))

    def poll(self) -> bool:
        """Move what can move. Whether anything did."""
        moved = False
        for mover in self._movers:
            moved |= mover.poll()
        return moved

    def cancel(self) -> None:
        """End a run that can't go on: wait until nothing uses rows, pieces or slots, and take all pieces back."""
        for mover in self._movers:
            mover.cancel()
        synchronize(self._device)
        self.in_use = False

    @property
    def pinned_bytes(self) -> int:
        """All pieces that have been allocated."""
        return sum(ring.allocated_bytes for ring in self._all_rings())

    def _all_rings(self) -> list[Ring]:
        return [ring for rings in self.rings.values() for ring in (rings.load, rings.store)]

    def restage(self, workers: Workers, staging: Staging) -> None:
        """Stage the next runs' rows with other workers and rings. Between runs only; frees the old rings' memory."""
        self.close()
        old = self._all_rings()
        self._set_up(workers, staging)
        for ring in old:
            ring.free(self._device.free_pinned)

    def close(self) -> None:
        """End the threads that move pieces. Before workers and device are closed; between runs only."""
        if self.in_use:
            self.cancel()
        for mover in self._movers:
            mover.close()
