"""The simulated device: what every device must do, and its hardware on a virtual clock."""

from __future__ import annotations

import pytest
from helpers.data import random_layer, random_rows
from helpers.device_tests import DeviceTests, wait

from pipeline.devices.sim import Hardware, SimDevice
from pipeline.errors import DriverError


class TestSim(DeviceTests):
    device_name = "sim"
    dtypes = ("float64", "float32", "bfloat16", "float16")


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
