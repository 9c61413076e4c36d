"""The grounds on which movers are tested: the simulated device, and the one with the fake driver."""

from __future__ import annotations

from helpers.mover_tests import Ground
from helpers.native_device import FAILURE, REFUSAL, NativeDevice, PythonOnly, fake_driver

from pipeline.devices.base import Device
from pipeline.devices.sim import Hardware, SimDevice
from pipeline.instrument import Ranges
from pipeline.rows import Workers
from pipeline.staging.mover import Mover
from pipeline.staging.native import NativeWorkers
from pipeline.staging.native_mover import open_native_mover
from pipeline.staging.python_mover import PythonMover
from pipeline.staging.ring import Rings


def in_c(device: Device, workers: Workers, rings: Rings) -> Mover:
    mover = open_native_mover(device, workers, rings, Ranges())
    assert mover is not None
    return mover


def native_ground() -> Ground:
    device = NativeDevice()
    return Ground(
        device,
        NativeWorkers(1),
        in_c,
        device.held,
        waits=device.waits,
        refuse=lambda copies: fake_driver().fake_trouble(REFUSAL, copies),
        fail=lambda copies: fake_driver().fake_trouble(FAILURE, copies),
    )


def python_ground() -> Ground:
    device = PythonOnly()
    return Ground(device, NativeWorkers(1), PythonMover, device.held)


def simulated_ground() -> Ground:
    device = SimDevice(Hardware(jitter=2.0, copy_threads=2))
    workers = device.workers()
    return Ground(device, workers, PythonMover)
