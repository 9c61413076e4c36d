"""How a layer's weights reach a device: through the pinned memory that its rows are staged in afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from pipeline.arrays import HostArray
from pipeline.config import Staging
from pipeline.devices.base import Device, Uploader
from pipeline.io.files import FileRows
from pipeline.io.mapped import is_in_file, open_map
from pipeline.io.memory import ArrayRows
from pipeline.pages import HUGE_PAGE_BYTES, touch
from pipeline.rows import Drain, Fill, Operation, SourceRows, Workers


class StagedUpload(Uploader):
    """Copy workers fill pinned blocks, from memory or past the map of a file, and the device copies these: a device's
    own copy of ordinary memory is several times slower (docs/notes/start.md)."""

    def __init__(self, device: Device, workers: Workers, staging: Staging) -> None:
        self._device, self.workers, self._staging = device, workers, staging
        self._memory: list[HostArray] = []  # for the blocks, and for the second of the two rings that follow

    @property
    def pinned_bytes(self) -> int:
        """What it holds: nothing before the first upload, and nothing once `take` has given it away."""
        return sum(memory.nbytes for memory in self._memory)

    def take(self, n_bytes: int) -> HostArray:
        """Pinned memory of the device: that of earlier uploads where it will do. No upload may follow then."""
        if self._memory and n_bytes <= self._memory[-1].nbytes:
            return self._memory.pop()[:n_bytes]
        return self._device.pinned(n_bytes)

    def touch(self, memory: HostArray) -> None:
        """By all copy workers: clearing pages takes the system longer than all else that is done with them."""
        rows = memory[: len(memory) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES].reshape(-1, HUGE_PAGE_BYTES)
        zeros = np.broadcast_to(np.zeros(HUGE_PAGE_BYTES, np.uint8), rows.shape)
        self.workers.run(Drain(ArrayRows(rows, fresh=True), 0, zeros))
        touch(memory[rows.nbytes :])

    def upload(self, rows: HostArray, copy: Callable[[int, HostArray], Callable[[], None]]) -> bool:
        staging = self._staging
        if rows.nbytes < 2 * staging.piece_bytes or rows.shape[1] * rows.itemsize > staging.piece_bytes:
            return False
        while len(self._memory) < 2:  # both now: pinning memory while copies are queued holds these up
            self._memory.append(self._device.pinned(staging.ring_pieces * staging.piece_bytes))
        whole = self._memory[0]
        pieces = [whole[i * staging.piece_bytes :][: staging.piece_bytes] for i in range(staging.ring_pieces)]
        with _read_from(rows) as source:
            self._copy_blocks(rows, source, pieces, copy)
        return True

    def _copy_blocks(
        self,
        rows: HostArray,
        source: SourceRows,
        pieces: list[HostArray],
        copy: Callable[[int, HostArray], Callable[[], None]],
    ) -> None:
        row_bytes = rows.shape[1] * rows.itemsize
        step = self._staging.piece_bytes // row_bytes
        blocks = [memory[: step * row_bytes].view(rows.dtype).reshape(step, -1) for memory in pieces]
        waits: dict[int, Callable[[], None]] = {}  # for the latest copy from each block

        def queue_copy(fill: Operation, number: int, block: HostArray) -> None:
            while not fill.done():
                time.sleep(0)
            waits[number % len(blocks)] = copy(number * step, block)

        filling: tuple[Operation, int, HostArray] | None = None
        try:
            for number, first in enumerate(range(0, len(rows), step)):
                if number >= len(blocks):
                    waits[number % len(blocks)]()
                block = blocks[number % len(blocks)][: len(rows) - first]
                fill = self.workers.submit(Fill(source, first, block))
                if filling is not None:
                    queue_copy(*filling)
                filling = fill, number, block
            if filling is not None:
                queue_copy(*filling)
        finally:
            self.workers.wait_all()


@contextmanager
def _read_from(rows: HostArray) -> Iterator[SourceRows]:
    """The rows of an array, to be read past the map where they lie in a file."""
    file = open_map(rows) if is_in_file(rows) else None
    if file is None:
        yield ArrayRows(rows)
        return
    try:
        yield FileRows(file.layout(rows), 0, None)
    finally:
        os.close(file.fd)
