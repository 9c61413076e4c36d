"""Chunks in memory that copy engines use as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, poisoned, random_layer, random_rows

from pipeline.devices.sim import SimDevice
from pipeline.errors import DriverError
from pipeline.instrument import Ranges, Recorder
from pipeline.io.memory import ArrayRows
from pipeline.staging.in_place_mover import InPlaceMover
from pipeline.staging.mover import Transfer

LAYER = random_layer(17, 9)
X = random_rows(12, 17)


@pytest.fixture
def device() -> Iterator[SimDevice]:
    device = SimDevice()
    device.prepare(LAYER, LAYER.dtype, 12)
    device.allocate(12, 2)
    yield device
    device.close()


@pytest.fixture
def mover(device: SimDevice) -> InPlaceMover:
    mover = InPlaceMover(device, 4 * 17, 4 * 9)
    mover.begin_run(Ranges())
    return mover


def finish(device: SimDevice, *transfers: Transfer) -> None:
    for transfer in transfers:
        while not transfer.done():
            device.idle()


def test_in_place_mover_takes_pinned_contiguous_rows_only(device: SimDevice, mover: InPlaceMover) -> None:
    pinned = device.pin(X.copy())
    for carries in (mover.loads, mover.stores):
        assert carries(ArrayRows(pinned)) and carries(ArrayRows(pinned[3:5]))
        assert not carries(ArrayRows(X)) and not carries(ArrayRows(pinned[:, 1:]))


def test_in_place_mover_makes_one_copy_a_chunk(device: SimDevice, mover: InPlaceMover) -> None:
    x, y = device.pin(X.copy()), device.pin(poisoned((12, 9)))
    load = mover.load(ArrayRows(x), 12, 1, 5)
    assert load.queued(), "at once"
    device.compute(1, 12, 0, None, None)
    store = mover.store(ArrayRows(y), 12, 1, 5)
    finish(device, load, store)
    assert_same_bits(y, LAYER(X))
    recorder = Recorder("sim")
    load.record(recorder)
    store.record(recorder)
    assert [(i.stage, i.chunk, i.bytes) for i in recorder.intervals] == [("H2D", 5, X.nbytes), ("D2H", 5, y.nbytes)]
    assert load.end_s == recorder.intervals[0].end_s < store.end_s == recorder.intervals[1].end_s
    assert not mover.poll(), "the device does it all"


@pytest.mark.parametrize("way", ["load", "store"])
def test_in_place_mover_tells_what_failed(
    way: str, device: SimDevice, mover: InPlaceMover, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ArrayRows(device.pin(X.copy() if way == "load" else poisoned((12, 9))))
    begin: Callable[..., Transfer] = mover.load if way == "load" else mover.store
    call = "upload" if way == "load" else "download"

    def refused(*_: Any) -> Any:
        raise DriverError("the driver refused")

    with monkeypatch.context() as patch:
        patch.setattr(device, call, refused)
        transfer = begin(rows, 12, 0, 0)
    assert not transfer.queued()
    with pytest.raises(DriverError, match="refused"):
        transfer.done()
    assert transfer.failed_stage == ("H2D" if way == "load" else "D2H")
    finish(device, begin(rows, 12, 0, 0))


def test_in_place_mover_cancels_by_waiting(device: SimDevice, mover: InPlaceMover) -> None:
    x = device.pin(X.copy())
    mover.load(ArrayRows(x), 12, 0, 0)
    assert device.busy
    mover.cancel()
    assert not device.busy
    assert np.array_equal(x, X)
