"""What a run raises, and what it leaves behind: errors of source, sink and device, and interrupts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.data import assert_same_bits, batches_of, random_rows
from helpers.executor_rig import Rig, TroubledFeed, TroubledSink, open_sim, raise_at
from helpers.leaks import PlannedError, nothing_left_behind, small_rings
from helpers.schedules import check_pieces, layer_of

import pipeline.executor as executor_module
from pipeline import Pipeline
from pipeline.devices.sim import Hardware, SimDevice
from pipeline.errors import DeviceError, DriverError
from pipeline.flow import Chunk
from pipeline.rows import Operation


@pytest.mark.parametrize("number", [0, 1, 7, 20])
@pytest.mark.parametrize("stage", ["H2D", "kernel", "D2H"])
def test_executor_device_failure_names_chunk_and_stage(
    stage: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = min(number, {"H2D": 37, "kernel": 9, "D2H": 18}[stage])
    rig = Rig(monkeypatch, seed=number, fail={stage: number})
    with pytest.raises(DriverError, match=f"simulated failure of {stage} operation {number}") as caught:
        rig.run()
    chunk = number if stage == "kernel" else number // 4  # 16 rows are 4 pieces of at most 5; D2H pieces hold 9
    notes = caught.value.__notes__
    assert len(notes) == 1 and notes[0].startswith(f"pipeline: in {stage} of chunk "), notes
    if stage != "D2H":
        assert f"of chunk {chunk} (rows {16 * chunk} to " in notes[0]
    check_pieces(rig.movers)
    rig.check_next_run()


@pytest.mark.parametrize("name", ["upload", "compute", "download"])
def test_executor_failure_of_a_device_call_names_chunk_and_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that the driver refuses at once, not when it would have run."""
    rig = Rig(monkeypatch)
    call = getattr(rig.device, name)

    def refused(slot: int, *arguments: Any) -> Operation:
        if rig.executor is not None and len(rig.executor._flights) > 1:
            monkeypatch.setattr(rig.device, name, call)
            raise DriverError("cuLaunchKernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
        return call(slot, *arguments)

    monkeypatch.setattr(rig.device, name, refused)
    with pytest.raises(DriverError, match="OUT_OF_RESOURCES") as caught:
        rig.run()
    stage = {"upload": "H2D", "compute": "kernel", "download": "D2H"}[name]
    assert [note.split(" of chunk")[0] for note in caught.value.__notes__] == [f"pipeline: in {stage}"]
    rig.check_next_run()


@pytest.mark.parametrize("row", [0, 5, 40, 149])
@pytest.mark.parametrize("where", ["fill", "drain"])
def test_executor_source_and_sink_errors_are_passed_on(where: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, seed=row)
    feed = TroubledFeed(rig.x, 16, raise_at(row - row % 5 if where == "fill" else 10**6))
    sink = TroubledSink(rig.out, raise_at(row - row % 16 if where == "drain" else 10**6))
    with pytest.raises(PlannedError) as caught:
        rig.run(feed, sink)
    assert len(caught.value.__notes__) == 1
    assert caught.value.__notes__[0].startswith(f"pipeline: in {where} of chunk ")
    rig.check_rest()
    # The chunks that were committed are complete, and they are the ones before the error.
    assert sink.committed % 16 == 0 and sink.committed <= row
    assert_same_bits(rig.out[: sink.committed], rig.expected[: sink.committed])
    rig.check_next_run()


@pytest.mark.parametrize("index", [0, 1, 5])
def test_executor_finishes_the_chunks_in_flight_when_the_source_fails(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(monkeypatch)
    sink = TroubledSink(rig.out)
    with pytest.raises(PlannedError) as caught:
        rig.run(TroubledFeed(rig.x, 16, at_take=raise_at(index)), sink)
    assert caught.value.__notes__ == [f"pipeline: in the source after {index} chunks"]
    assert sink.committed == 16 * index
    assert_same_bits(rig.out[: 16 * index], rig.expected[: 16 * index])
    rig.check_rest()
    rig.check_next_run()


@pytest.mark.parametrize("where", ["commit", "progress"])
def test_executor_commit_and_progress_errors_are_passed_on(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)

    def refuse(chunk: Chunk) -> None:
        if chunk.index == 3:
            raise PlannedError

    sink = TroubledSink(rig.out, at_commit=refuse if where == "commit" else lambda chunk: None)
    with pytest.raises(PlannedError) as caught:
        rig.run(sink=sink, on_commit=refuse if where == "progress" else lambda chunk: None)
    assert caught.value.__notes__ == ["pipeline: in the sink of chunk 3 (rows 48 to 63)"]
    rig.check_rest()
    rig.check_next_run()


def test_executor_first_error_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)

    class FirstError(Exception):
        pass

    feed = TroubledFeed(rig.x, 16, raise_at(0, FirstError))
    with pytest.raises(FirstError) as caught:
        rig.run(feed, TroubledSink(rig.out, raise_at(0)))
    assert len(caught.value.__notes__) == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["idle", "fill", "drain", "progress", "take"])
def test_executor_interrupt_leaves_every_buffer_free(
    where: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 9, 30):
        rig = Rig(monkeypatch, seed=count)
        calls = iter(range(10**6))

        def interrupt(*_: object, calls: Iterator[int] = calls, count: int = count) -> None:
            if next(calls) == (count if where in ("idle", "fill") else count // 5):
                raise kind

        if where == "idle":
            idle = rig.device.idle
            monkeypatch.setattr(rig.device, "idle", lambda idle=idle, interrupt=interrupt: (interrupt(), idle()))
        feed = TroubledFeed(
            rig.x, 16, interrupt if where == "fill" else raise_at(10**6), interrupt if where == "take" else raise_at(99)
        )
        sink = TroubledSink(rig.out, interrupt if where == "drain" else raise_at(10**6))
        with pytest.raises(kind):
            rig.run(feed, sink, interrupt if where == "progress" else lambda chunk: None)
        check_pieces(rig.movers)
        rig.check_next_run()


def test_executor_second_interrupt_waits_for_what_is_in_flight_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies still use pieces, the caller's arrays and descriptors that are closed when the run is over."""
    rig = Rig(monkeypatch)
    idle, synchronize = rig.device.idle, rig.device.synchronize
    calls = iter(range(10**6))

    def interrupted_idle() -> None:
        if next(calls) == 20:
            raise KeyboardInterrupt
        idle()

    in_flight: list[int] = []

    def interrupted_synchronize() -> None:
        monkeypatch.setattr(rig.device, "synchronize", synchronize)
        in_flight.append(rig.device.busy)
        raise KeyboardInterrupt

    monkeypatch.setattr(rig.device, "idle", interrupted_idle)
    monkeypatch.setattr(rig.device, "synchronize", interrupted_synchronize)
    with pytest.raises(KeyboardInterrupt):
        rig.run()
    assert in_flight[0] and not rig.device.busy, "the test wants something in flight"
    rig.check_next_run()


def test_executor_error_while_abandoning_does_not_hide_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, fail={"kernel": 2})

    def lost() -> None:
        raise DeviceError("the device is lost")

    synchronize = rig.device.synchronize
    monkeypatch.setattr(rig.device, "synchronize", lambda: (synchronize(), lost()))
    with pytest.raises(DriverError, match="kernel operation 2"):
        rig.run()


@pytest.mark.parametrize("stage", ["H2D", "kernel", "D2H"])
def test_pipeline_runs_again_after_a_device_failure(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(200, 17)
    with nothing_left_behind():
        open_sim(monkeypatch, SimDevice(Hardware(jitter=1.0), fail={stage: 3}))
        with Pipeline(layer, devices="sim", chunk_rows=16) as pipeline:
            for source in (x, batches_of(x, [30])):
                pipeline.fleet.stations[0].device._counts[stage] = 0  # type: ignore[attr-defined]
                with pytest.raises(DriverError, match="simulated failure"):
                    pipeline.run(source)
                assert_same_bits(pipeline.run(x).out, layer(x))
                assert_same_bits(pipeline.run(batches_of(x, [30])).out, layer(x))


def test_executor_module_has_no_clock_of_its_own() -> None:
    """All times come from the device and its workers, so that a simulated run takes no real time for waiting."""
    assert not hasattr(executor_module, "time")


@pytest.mark.parametrize("outcome", ["success", "failure", "interrupt"])
def test_executor_keeps_nothing_of_the_callers_after_a_run(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    trouble = {
        "success": lambda row: None,
        "failure": raise_at(70),
        "interrupt": raise_at(70, KeyboardInterrupt),
    }[outcome]
    feed, sink = TroubledFeed(rig.x, 16, trouble), TroubledSink(rig.out)
    gone = [weakref.ref(feed), weakref.ref(sink)]
    try:
        rig.run(feed, sink)
    except (PlannedError, KeyboardInterrupt):
        assert outcome != "success"
    del feed, sink, trouble
    rig.executor = None
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
