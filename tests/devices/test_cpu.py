"""The CPU as a device: what every device must do, and its threads."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading

import pytest
from helpers.data import random_layer, random_rows
from helpers.device_tests import DeviceTests
from helpers.leaks import wait_until

from pipeline.devices.cpu import CpuDevice


class TestCpu(DeviceTests):
    device_name = "cpu"
    dtypes = ("float64", "float32", "bfloat16", "float16")


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
