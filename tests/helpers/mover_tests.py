"""What every mover must do: `MoverTests` runs each check of `CHECKS` with the movers of several grounds.

A check is a function of a `Ground`: a device with slots, copy workers, and one mover between them. The same checks show
that planted faults are noticed (tests/staging/test_mover_faults.py), so each is short and none blocks for good.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, poisoned, random_layer, random_rows

from pipeline.arrays import HostArray
from pipeline.devices.base import Device
from pipeline.errors import DriverError, FileFormatError, OutputError, PipelineError
from pipeline.instrument import Ranges, Recorder
from pipeline.io.files import FileLayout, FileRows
from pipeline.io.memory import ArrayRows
from pipeline.layer.linear import FusedLinear
from pipeline.rows import Drain, SourceRows, TargetRows, Workers
from pipeline.staging.mover import Mover, Transfer
from pipeline.staging.ring import Ring, Rings

IN, OUT, CHUNK, SLOTS = 17, 9, 24, 3
PIECES, PIECE_ROWS = 3, 5  # a chunk has more pieces than fit the ring


def _not_held(stage: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Ground:
    """A device with slots, copy workers, and the mover under test."""

    device: Device
    workers: Workers
    make: Callable[[Device, Workers, Rings], Mover]
    held: Callable[[str], AbstractContextManager[None]] = _not_held  # keeps a stage from beginning
    waits: Callable[[str], bool] | None = None  # whether something is queued for a stage that is held
    refuse: Callable[[int], None] | None = None  # makes the driver refuse the copy after so many others
    fail: Callable[[int], None] | None = None  # makes it fail after it was queued
    patience_s: float = 10.0
    layer: FusedLinear = field(init=False)

    def __post_init__(self) -> None:
        self.layer = random_layer(IN, OUT)
        self.device.prepare(self.layer, self.layer.dtype, CHUNK)
        self.device.allocate(CHUNK, SLOTS)
        dtype = self.layer.dtype

        def ring(features: int) -> Ring:
            size = PIECE_ROWS * features * dtype.itemsize
            return Ring(self.device.pinned, PIECES, size, features, dtype, poison=True)

        self.rings = Rings(ring(IN), ring(OUT))
        self.mover = self.make(self.device, self.workers, self.rings)
        self.mover.begin_run(Ranges())

    @property
    def holds(self) -> bool:
        """Whether stages can be held; else a clock of the device's own decides what comes when."""
        return self.held is not _not_held

    def look(self) -> None:
        """Let the mover and the device do something."""
        if not self.mover.poll():
            self.device.idle()

    def wait(self, condition: Callable[[], Any], what: str, seconds: float | None = None) -> None:
        end_s = time.monotonic() + (seconds or self.patience_s)
        while not condition():
            assert time.monotonic() < end_s, f"waited too long for {what}"
            self.look()

    def finish(self, *transfers: Transfer) -> None:
        for transfer in transfers:
            self.wait(transfer.done, "a transfer")

    def load(self, x: HostArray, slot: int, chunk: int = 0) -> Transfer:
        rows = ArrayRows(x)
        assert self.mover.loads(rows)
        return self.mover.load(rows, len(x), slot, chunk)

    def store(self, y: HostArray, slot: int, chunk: int = 0) -> Transfer:
        rows = ArrayRows(y)
        assert self.mover.stores(rows)
        return self.mover.store(rows, len(y), slot, chunk)

    def compute(self, slot: int, rows: int) -> Any:
        return self.device.compute(slot, rows, 0, None, None)

    def through(self, x: HostArray, y: HostArray, slot: int, chunk: int = 0) -> tuple[Transfer, Transfer]:
        """Bring rows in, compute them and begin to bring the results back."""
        load = self.load(x, slot, chunk)
        self.wait(load.queued, "the copies to the device to be queued")
        self.compute(slot, len(x))
        return load, self.store(y, slot, chunk)

    def close(self) -> None:
        self.mover.cancel()
        self.mover.close()
        self.workers.close()
        self.device.close()


def chunks_come_through(ground: Ground) -> None:
    """Rows are copied bit for bit and nothing beside them, with a chunk in each slot; once a transfer is done, nothing
    reads the source any more and all of the target is there."""
    sizes = [CHUNK, CHUNK, 1, PIECE_ROWS, CHUNK, PIECE_ROWS + 1, CHUNK, 2, CHUNK]
    under_way: list[tuple[Transfer, Transfer, HostArray, HostArray, HostArray]] = []
    for number, rows in enumerate(sizes):
        if len(under_way) == SLOTS:
            _end(ground, *under_way.pop(0))
        x, y = random_rows(rows, IN, seed=number), poisoned((rows + 2, OUT))
        expected = ground.layer(x)
        under_way.append((*ground.through(x, y[1:-1], number % SLOTS, number), x, y, expected))
    for each in under_way:
        _end(ground, *each)


def _end(ground: Ground, load: Transfer, store: Transfer, x: HostArray, y: HostArray, expected: HostArray) -> None:
    ground.finish(load)
    x[...] = np.nan
    ground.finish(store)
    assert_same_bits(y[1:-1].copy(), expected)
    assert np.isnan(y[0]).all() and np.isnan(y[-1]).all()


def a_kernel_may_follow_once_all_copies_are_queued(ground: Ground) -> None:
    x, y = random_rows(2 * PIECE_ROWS, IN), poisoned((2 * PIECE_ROWS, OUT))
    with ground.held("H2D"):
        load, store = ground.through(x, y, 0)
    ground.finish(load, store)
    assert_same_bits(y, ground.layer(x))


def a_store_waits_for_its_kernel(ground: Ground) -> None:
    x, y = random_rows(CHUNK, IN), poisoned((CHUNK, OUT))
    ground.finish(*ground.through(x, y, 0))
    x, y = random_rows(CHUNK, IN, seed=1), poisoned((CHUNK, OUT))
    ground.finish(ground.load(x, 0))
    with ground.held("kernel"):
        ground.compute(0, CHUNK)
        store = ground.store(y, 0)
        end_s = time.monotonic() + 0.3  # a store that doesn't wait is over by then, a machine that is busy aside
        while ground.holds and time.monotonic() < end_s:
            assert not store.done(), "rows came back before their kernel had run"
            ground.look()
    ground.finish(store)
    assert_same_bits(y, ground.layer(x))


def pieces_are_used_again_after_their_event_only(ground: Ground) -> None:
    """While no copy to the device begins, no more rows can be queued than the ring holds."""
    x, y = random_rows(CHUNK, IN), poisoned((CHUNK, OUT))
    with ground.held("H2D"):
        load = ground.load(x, 0)
        for _ in range(50):
            ground.look()
        assert ground.held is _not_held or not load.queued(), "more rows are queued than the ring holds"
    ground.wait(load.queued, "the copies to the device to be queued")
    ground.compute(0, CHUNK)
    ground.finish(load, ground.store(y, 0))
    assert_same_bits(y, ground.layer(x))


def pieces_are_drained_before_they_are_used_again(ground: Ground) -> None:
    """Copy workers that have other things to do hold up a store, and then all its rows are there nevertheless."""
    rows = 2 * PIECE_ROWS  # which fit the ring, so that all drains come after the other jobs
    x, y = random_rows(rows, IN), poisoned((rows, OUT))
    ground.finish(ground.load(x, 0))
    ground.compute(0, rows)
    ground.device.synchronize()
    busy = _keep_busy(ground)
    store = ground.store(y, 0)
    ground.wait(store.done, "the store")
    assert_same_bits(y, ground.layer(x))
    ground.wait(lambda: all(job.done() for job in busy), "the other jobs")


def _keep_busy(ground: Ground) -> list[Any]:
    """Drains ahead of what comes next."""
    piece = np.ones((1, 2_000_000), np.float32)
    return [ground.workers.submit(Drain(ArrayRows(np.empty_like(piece)), 0, piece)) for _ in range(4)]


def transfers_end_in_the_order_in_which_they_were_begun(ground: Ground) -> None:
    x = [random_rows(CHUNK, IN, seed=n) for n in range(3)]
    with ground.held("H2D"):
        loads = [ground.load(x[n], n, n) for n in range(3)]
        for _ in range(20):
            ground.look()
    ground.finish(*loads)
    assert [a.end_s <= b.end_s for a, b in pairwise(loads)] == [True, True]
    for slot in range(3):
        ground.compute(slot, CHUNK)
    stores = [ground.store(poisoned((CHUNK, OUT)), n, n) for n in range(3)]
    ground.finish(*stores)
    assert [a.end_s <= b.end_s for a, b in pairwise(stores)] == [True, True]


def what_rests_wakes_up(ground: Ground) -> None:
    """A transfer in either direction that comes after a while without any is not forgotten."""
    x, y = random_rows(CHUNK, IN), poisoned((CHUNK, OUT))
    load, store = ground.through(x, y, 0)
    for _ in range(4):
        ground.finish(load, store)
        time.sleep(0.005)  # now its thread rests, if it has one
        store = ground.store(y, 0)
        ground.finish(store)
        time.sleep(0.005)
        load = ground.load(x, 0)


def every_piece_is_recorded(ground: Ground) -> None:
    x, y = random_rows(CHUNK, IN), poisoned((CHUNK, OUT))
    recorder = Recorder("ground")
    transfers = ground.through(x, y, 1, chunk=7)
    for transfer in transfers:
        ground.finish(transfer)
        transfer.record(recorder)
    pieces = -(-CHUNK // PIECE_ROWS)
    for first, second, row_bytes in (("fill", "H2D", 4 * IN), ("D2H", "drain", 4 * OUT)):
        spans = {s: [each for each in recorder.intervals if each.stage == s] for s in (first, second)}
        for own in spans.values():
            assert [each.bytes for each in own] == [PIECE_ROWS * row_bytes] * (pieces - 1) + [4 * row_bytes]
            assert {each.chunk for each in own} == {7}
            assert all(each.start_s <= each.end_s for each in own)
            assert all(a.start_s <= b.start_s for a, b in pairwise(own))
        assert all(a.start_s <= b.start_s for a, b in zip(spans[first], spans[second], strict=True))
    load, store = transfers
    assert load.end_s <= store.end_s == max(each.end_s for each in recorder.intervals)


def used_pieces_are_poisoned(ground: Ground) -> None:
    ground.finish(*ground.through(random_rows(CHUNK, IN), poisoned((CHUNK, OUT)), 0))
    for ring in (ground.rings.load, ground.rings.store):
        assert ring.allocated_bytes
        for piece in range(PIECES):
            assert np.isnan(ring.rows(piece, PIECE_ROWS)).all()


@contextmanager
def _file(n_bytes: int, mode: int) -> Iterator[tuple[int, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(bytes(n_bytes))
        fd = os.open(path, mode)
        try:
            yield fd, path
        finally:
            os.close(fd)


def _file_rows(fd: int, path: Path, features: int, *, reads: bool) -> FileRows:
    return FileRows(FileLayout.in_order(fd, path, 100, features, 4, reads=reads), 0, None)


def rows_that_cannot_be_copied_fail_alone(ground: Ground) -> None:
    """A file that ends early is named with the very byte; what was begun before and after comes through."""
    there = 100 + 13 * 4 * IN + 1
    x, y = random_rows(CHUNK, IN), poisoned((CHUNK, OUT))
    with _file(there, os.O_RDONLY) as (fd, path):
        rows: SourceRows = _file_rows(fd, path, IN, reads=True)
        before = ground.load(x, 0)
        cut = ground.mover.load(rows, CHUNK, 1, 1)
        after = ground.load(x, 2, 2)
        with pytest.raises(FileFormatError, match=rf"rows ended at byte {there}, \d+ bytes early"):
            ground.finish(cut)
        assert cut.failed_stage == "fill" and not cut.queued()
        ground.finish(before, after)
        target: TargetRows = _file_rows(fd, path, OUT, reads=False)  # which was opened to be read
        for slot in (0, 2):
            ground.compute(slot, CHUNK)
        refused = ground.mover.store(target, CHUNK, 0, 0)
        store = ground.store(y, 2)
        with pytest.raises(OutputError, match="rows failed: Bad file descriptor"):
            ground.finish(refused)
        assert refused.failed_stage == "drain"
        ground.finish(store)
        assert_same_bits(y, ground.layer(x))


def copies_that_fail_on_the_device_are_reported(ground: Ground) -> None:
    x = random_rows(CHUNK, IN)
    for way, code in ((ground.refuse, 1), (ground.fail, 700)):
        if way is None:
            continue
        for copies in (0, 3):
            way(copies)
            load = ground.load(x, 0)
            with pytest.raises(DriverError, match=f"H2D copy of slot 0 failed: {code}"):
                ground.finish(load)
            assert load.failed_stage == "H2D"
            if way is ground.fail:  # that error stays, as the one of a lost GPU does
                return
            chunks_come_through(ground)


def cancelling_at_any_moment_leaves_nothing_under_way(ground: Ground) -> None:
    """Afterwards nothing writes to the caller's memory, and the mover works as before."""
    for looks in (0, 1, 2, 5, 9, 20):
        x, y = [random_rows(CHUNK, IN, seed=n) for n in range(SLOTS)], poisoned((SLOTS, CHUNK, OUT))
        for slot in range(SLOTS):
            ground.finish(ground.load(x[slot], slot))
            ground.compute(slot, CHUNK)
        expected = [ground.layer(rows) for rows in x]
        transfers = [ground.store(y[slot], slot) for slot in range(SLOTS)]
        ground.device.synchronize()
        transfers += [ground.load(x[slot], slot) for slot in range(SLOTS)]
        for _ in range(looks):
            ground.look()
        ground.mover.cancel()
        kept = y.copy()
        for each in x:
            each[...] = np.nan
        for number, transfer in enumerate(transfers):
            try:
                if transfer.done() and number < SLOTS:
                    assert_same_bits(y[number], expected[number])
            except PipelineError as error:
                assert "cancelled" in str(error)
        for _ in range(3):
            ground.look()
        np.testing.assert_array_equal(y, kept)
    chunks_come_through(ground)


def cancelling_waits_for_the_last_piece(ground: Ground) -> None:
    for stage in ("H2D", "D2H"):
        x, y = random_rows(1, IN), poisoned((1, OUT))
        ground.finish(ground.load(x, 0))
        ground.compute(0, 1)
        ground.device.synchronize()
        let_go = threading.Event()
        with ExitStack() as holding:
            holding.enter_context(ground.held(stage))
            transfer = ground.load(x, 0) if stage == "H2D" else ground.store(y, 0)
            if stage == "H2D":
                ground.wait(lambda transfer=transfer: transfer.queued(), "its one copy to be queued")
            elif ground.waits is not None:
                ground.wait(lambda stage=stage: ground.waits(stage), "its one copy to be queued")
            else:
                for _ in range(20):
                    ground.look()
            threading.Timer(0.1, lambda let_go=let_go, holding=holding: (let_go.set(), holding.close())).start()
            ground.mover.cancel()
            assert let_go.is_set() or ground.held is _not_held, f"{stage} goes on after cancel() has returned"
    chunks_come_through(ground)


def what_is_under_way_is_kept_alive(ground: Ground) -> None:
    """Also where nobody else does, as after an interrupt; and not for longer."""
    x = random_rows(CHUNK, IN)
    with ground.held("H2D"):
        gone = weakref.ref(ground.load(x, 0))
        for _ in range(3):
            ground.look()
        gc.collect()
        assert gone() is not None, "what is under way has been freed"
    ground.mover.cancel()
    gc.collect()
    assert gone() is None, "what has been cancelled is kept"


CHECKS: dict[str, Callable[[Ground], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        chunks_come_through,
        a_kernel_may_follow_once_all_copies_are_queued,
        a_store_waits_for_its_kernel,
        pieces_are_used_again_after_their_event_only,
        pieces_are_drained_before_they_are_used_again,
        transfers_end_in_the_order_in_which_they_were_begun,
        what_rests_wakes_up,
        every_piece_is_recorded,
        used_pieces_are_poisoned,
        rows_that_cannot_be_copied_fail_alone,
        copies_that_fail_on_the_device_are_reported,
        cancelling_at_any_moment_leaves_nothing_under_way,
        cancelling_waits_for_the_last_piece,
        what_is_under_way_is_kept_alive,
    )
}


class MoverTests:
    """The tests every mover passes. A subclass named Test<Mover> gives the ground."""

    @pytest.fixture
    def ground(self) -> Iterator[Ground]:
        ground = self.open_ground()
        yield ground
        ground.close()

    def open_ground(self) -> Ground:
        raise NotImplementedError

    @pytest.mark.parametrize("check", CHECKS)
    def test_mover(self, check: str, ground: Ground) -> None:
        with ground.device.running():
            CHECKS[check](ground)
