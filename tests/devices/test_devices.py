"""The devices that run on any machine, against the tests that every device passes."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import textwrap
import threading
from typing import Any

import numpy as np
import pytest
from helpers.data import random_layer, random_rows
from helpers.device_tests import DeviceTests, wait
from helpers.leaks import wait_until

from pipeline.arrays import HostArray
from pipeline.devices.cpu import CpuDevice
from pipeline.devices.cuda import count_gpus
from pipeline.devices.names import find_devices, open_device
from pipeline.devices.sim import Hardware, SimDevice
from pipeline.dtypes import FLOAT32
from pipeline.errors import DeviceMemoryError, DeviceNotFoundError, DriverError, OptionError
from pipeline.staging.ring import Ring


class TestCpu(DeviceTests):
    device_name = "cpu"
    dtypes = ("float64", "float32", "bfloat16", "float16")


class TestSim(DeviceTests):
    device_name = "sim"
    dtypes = ("float64", "float32", "bfloat16", "float16")


def test_find_devices_takes_the_cpu_where_there_is_no_gpu() -> None:
    if count_gpus():
        pytest.skip("there is a GPU")
    assert find_devices(None) == ["cpu"]


def test_find_devices_keeps_names_and_order() -> None:
    assert find_devices("cpu") == ["cpu"]
    assert find_devices(("sim", "cpu")) == ["sim", "cpu"]


@pytest.mark.parametrize("wanted", [[], "", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ["cpu", "cpu"], 5, [None], {}])
def test_find_devices_refuses_what_is_no_device(wanted: object) -> None:
    with pytest.raises(OptionError, match="device"):
        find_devices(wanted)  # type: ignore[arg-type]


def test_find_devices_refuses_the_same_gpu_under_two_names() -> None:
    with pytest.raises(OptionError, match="different device names"):
        find_devices(["cuda", "cuda:0"])


def test_find_devices_names_a_gpu_that_is_not_there() -> None:
    with pytest.raises(DeviceNotFoundError, match=r"'cuda:99' isn't there; .*devices='cpu'"):
        find_devices("cuda:99")


def test_open_device_opens_by_name() -> None:
    for name in ("cpu", "sim"):
        device = open_device(name)
        assert device.name == name
        device.close()


# -- the simulated hardware --------------------------------------------------------------------------------------------


def sim(seed: int = 0, **hardware: float) -> SimDevice:
    device = SimDevice(Hardware(**hardware), seed=seed)  # type: ignore[arg-type]
    layer = random_layer(16, 8)
    device.prepare(layer, layer.dtype, 32)
    device.allocate(32, 2)
    return device


def test_sim_engines_run_side_by_side_and_each_is_a_fifo() -> None:
    device, x = sim(latency_s=1.0), random_rows(32, 16)
    first, second = device.upload(0, 0, x), device.upload(1, 0, x)
    kernel = device.compute(0, 32, 0, None, None)
    wait(device, first, second, kernel)
    assert second.times()[0] == first.times()[1], "one engine: one copy after the other"
    assert kernel.times()[0] == first.times()[1], "another engine: at once, after its slot's copy"


def test_sim_rates_give_the_durations() -> None:
    device, x = sim(latency_s=0.0, h2d_rate=1024.0, flop_rate=2 * 32 * 16 * 8 / 3), random_rows(32, 16)
    copy, kernel = device.upload(0, 0, x), device.compute(0, 32, 0, None, None)
    wait(device, kernel)
    assert copy.times() == pytest.approx((0.0, x.nbytes / 1024))
    assert kernel.times()[1] - kernel.times()[0] == pytest.approx(3.0)


def test_sim_one_seed_gives_one_schedule() -> None:
    def times(seed: int) -> list[tuple[float, float]]:
        device, x = sim(seed, jitter=1.0), random_rows(32, 16)
        operations = [device.upload(n % 2, 0, x) for n in range(20)]
        wait(device, *operations)
        return [operation.times() for operation in operations]

    assert times(1) == times(1)
    assert times(1) != times(2)


def test_sim_fails_the_operation_it_was_told_to() -> None:
    device = SimDevice(fail={"H2D": 2})
    layer, x = random_layer(16, 8), random_rows(32, 16)
    device.prepare(layer, layer.dtype, 32)
    device.allocate(32, 2)
    wait(device, device.upload(0, 0, x), device.upload(0, 0, x))
    with pytest.raises(DriverError, match="simulated failure of H2D operation 2") as caught:
        wait(device, device.upload(0, 0, x))
    assert caught.value.code == "CUDA_ERROR_SIMULATED"
    wait(device, device.upload(0, 0, x))


def test_sim_touches_memory_only_at_start_and_end() -> None:
    device, x = sim(), random_rows(32, 16)
    copy = device.upload(0, 0, x)
    x[...] = 3.0  # reused before the event: the copy reads what is there when it ends
    wait(device, copy)
    assert (device._inputs[0] == 3.0).all()


def test_cpu_waits_for_nothing_that_an_interrupt_kept_from_being_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(engine: object, task: object) -> None:
        raise KeyboardInterrupt

    device, layer, x = CpuDevice(), random_layer(16, 8), random_rows(32, 16)
    device.prepare(layer, layer.dtype, 32)
    device.allocate(32, 2)
    copy = device.upload(0, 0, x)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.devices.cpu._Engine.queue", interrupted)
        device.upload(0, 0, x)
    device.synchronize()
    assert copy.done()
    device.close()


def test_cpu_threads_end_with_a_device_that_nobody_closed() -> None:
    device = CpuDevice()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("pipeline-cpu-")]
    assert len(threads) >= 4
    del device
    gc.collect()
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


def test_process_that_closes_no_pipeline_exits_cleanly() -> None:
    code = """
        import numpy as np
        from pipeline import FusedLinear, Pipeline

        weight = np.ones((64, 64), np.float32)
        pipeline = Pipeline(FusedLinear(weight), devices="cpu", chunk_rows=128)
        assert pipeline.run(np.ones((20_000, 64), np.float32)).out.shape == (20_000, 64)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# -- CUDA operations, without a GPU ------------------------------------------------------------------------------------


class FakeEvents:
    """Events that fire when the test says so, in place of the pool's. Each has the name of its stream."""

    def __init__(self) -> None:
        from pipeline.devices.cuda_events import ClockAnchor

        self.anchor = ClockAnchor("anchor", 100.0)
        self.fired: dict[str, float] = {}  # seconds on the host's clock
        self.released: list[str] = []

    def record(self, stream: str) -> str:
        return stream

    def elapsed_s(self, anchor: str, event: str) -> float:
        assert anchor == self.anchor.event
        return self.fired[event] - self.anchor.host_s

    def release(self, event: str) -> None:
        self.released.append(event)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> FakeEvents:
    from types import SimpleNamespace

    from pipeline.devices import cuda_events

    events = FakeEvents()
    api = SimpleNamespace(
        cuEventQuery=lambda event: (0 if event in events.fired else 600,),
        CUresult=SimpleNamespace(CUDA_ERROR_NOT_READY=600),
    )
    monkeypatch.setattr(cuda_events, "driver", lambda: api)
    return events


def test_cuda_operation_starts_when_it_is_queued_or_when_the_last_before_it_ends(events: FakeEvents) -> None:
    from pipeline.devices.cuda_events import CudaOperation

    first = CudaOperation(events, "first", "H2D copy", 101.0, [])  # type: ignore[arg-type]
    second = CudaOperation(events, "second", "H2D copy", 101.5, [first])  # type: ignore[arg-type]
    kernel = CudaOperation(events, "kernel", "kernel", 101.6, [second])  # type: ignore[arg-type]
    late = CudaOperation(events, "late", "D2H copy", 107.0, [kernel, first])  # type: ignore[arg-type]
    assert not any(operation.done() for operation in (first, second, kernel, late))
    events.fired = {"first": 103.0, "second": 105.0, "kernel": 106.0, "late": 108.0}
    assert late.done() and late.times() == (107.0, 108.0), "the bus stood still until it was queued"
    assert kernel.times() == (105.0, 106.0), "asked on the way"
    assert second.times() == (103.0, 105.0) and first.times() == (101.0, 103.0)
    assert sorted(events.released) == ["first", "kernel", "late", "second"]
    assert not late._before, "what came before isn't kept"
    assert events.anchor.needed_by == 0


def test_cuda_operation_holds_other_streams_until_it_is_seen_to_be_done(
    events: FakeEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.devices import cuda_events

    waits: list[Any] = []
    monkeypatch.setattr(cuda_events, "call", lambda *arguments: waits.append(arguments))
    upload = cuda_events.CudaOperation(events, "H2D", "H2D copy", 101.0, [])  # type: ignore[arg-type]
    upload.hold("H2D")
    assert waits == [], "a stream keeps its order by itself"
    upload.hold("kernels")
    events.fired["H2D"] = 102.0
    upload.hold("kernels")
    assert waits == 2 * [("cuStreamWaitEvent", "kernels", "H2D", 0)]
    assert upload.done()
    upload.hold("kernels")
    assert len(waits) == 2, "its event may belong to another operation by now"


def test_cuda_times_follow_the_hosts_clock_from_which_the_gpus_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose clock is slow by 100 ppm, ten minutes of copies one after the other, and one that takes long."""
    from types import SimpleNamespace

    from pipeline.devices import cuda_events

    clock, events = SimpleNamespace(now_s=0.0), itertools.count()
    fired: dict[int, float] = {}  # on the GPU's clock

    def record(event: int, stream: object) -> tuple[int]:
        fired[event] = clock.now_s * (1 - 1e-4)
        return (0,)

    def call(name: str, *arguments: Any) -> Any:
        if name == "cuEventCreate":
            return next(events)
        if name == "cuEventElapsedTime":
            start, end = arguments
            return float(np.float32((fired[end] - fired[start]) * 1e3))
        assert name == "cuEventSynchronize"
        clock.now_s += 5e-6

    api = SimpleNamespace(
        cuEventRecord=record, cuEventQuery=lambda event: (0,), CUresult=SimpleNamespace(CUDA_ERROR_NOT_READY=600)
    )
    monkeypatch.setattr(cuda_events, "driver", lambda: api)
    monkeypatch.setattr(cuda_events, "call", call)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now_s)
    pool = cuda_events.EventPool("stream")
    slow_start_s = clock.now_s
    slow = cuda_events.CudaOperation(pool, "stream", "kernel", slow_start_s, [])
    while clock.now_s < 600:
        pool.renew_anchor()
        queued_s = clock.now_s
        clock.now_s += 0.01
        copy = cuda_events.CudaOperation(pool, "stream", "H2D copy", queued_s, [])
        assert copy.done() and copy.times() == pytest.approx((queued_s, clock.now_s), abs=50e-6)
    record(slow._end, "stream")
    assert slow.done() and slow.times()[1] == pytest.approx(clock.now_s, rel=2e-4), "its anchor is still there"
    assert next(events) < 20, "events are used again"


def test_cuda_operation_never_ends_before_it_starts(events: FakeEvents) -> None:
    from pipeline.devices.cuda_events import CudaOperation

    operation = CudaOperation(events, "event", "kernel", 104.0, [])  # type: ignore[arg-type]
    events.fired["event"] = 103.99  # the two clocks differ by some microseconds
    assert operation.done() and operation.times() == (103.99, 103.99)


# -- pinned memory -----------------------------------------------------------------------------------------------------


def test_ring_goes_on_where_an_allocation_failed() -> None:
    allocated: list[int] = []

    def allocate(n_bytes: int) -> HostArray:
        allocated.append(n_bytes)
        if len(allocated) in (3, 4):
            raise DeviceMemoryError("no more")
        return np.empty(n_bytes, np.uint8)

    ring = Ring(allocate, 4, 640, 16, FLOAT32)
    for _ in range(2):
        with pytest.raises(DeviceMemoryError):
            ring.take()
    assert sorted(ring.take() for _ in range(4)) == [0, 1, 2, 3] and not ring.available
    assert allocated == 6 * [640] and ring.allocated_bytes == 4 * 640, "what it had is used"
    assert ring.rows(3, 10).shape == (10, 16)
