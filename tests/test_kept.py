"""What `run_pipelined` keeps warm between calls: for whom, for how long, within which bounds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, random_layer, random_rows
from helpers.leaks import PlannedError, nothing_left_behind, pipeline_threads, wait_until
from helpers.pipelines import LAYER, X

from pipeline import SigmoidScaleResidual, kept, release, run_pipelined
from pipeline.arrays import HostArray
from pipeline.devices.cpu import CpuDevice
from pipeline.errors import DeviceError, DeviceMemoryError, InputError
from pipeline.rows import DeviceRows


class Bus(CpuDevice):
    """The CPU as a device that is slow to open: it has memory of its own."""

    has_bus = True
    allocated_bytes = 1000
    opened: list[Bus]

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[HostArray] = []
        self.closed = False
        Bus.opened.append(self)

    def pinned(self, n_bytes: int) -> HostArray:
        self.memory.append(super().pinned(n_bytes))
        return self.memory[-1]

    def in_place(self, rows: HostArray) -> bool:
        return any(np.may_share_memory(rows, memory) for memory in self.memory)

    def own_rows(self, rows: HostArray) -> DeviceRows | None:
        return None

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Bus]]:
    """The devices that were opened in the test."""
    monkeypatch.setenv("PIPELINE_TUNE", "0")
    monkeypatch.setattr("pipeline.fleet.open_device", lambda name: Bus())
    Bus.opened = []
    with nothing_left_behind():
        yield Bus.opened
        release()
        assert all(device.closed for device in Bus.opened)


def run(layer: Any = LAYER, x: Any = X, **options: Any) -> Any:
    out = run_pipelined(layer, x, devices="cpu", **{"chunk_rows": 16, **options}).out
    assert_same_bits(out, layer(x))
    return out


def test_second_call_finds_everything_open(opened: list[Bus]) -> None:
    for x in (X, X[:33], X + 1):
        run(x=x)
    assert len(opened) == 1 and not opened[0].closed
    release()
    assert opened[0].closed
    release()
    run()
    assert len(opened) == 2


@pytest.mark.parametrize("options", [{"chunk_rows": 8}, {"num_streams": 2}, {"out_dtype": "float16"}])
def test_call_with_another_option_gets_its_own(opened: list[Bus], options: dict[str, Any]) -> None:
    run()
    run_pipelined(LAYER, X, devices="cpu", **{"chunk_rows": 16, **options})
    assert len(opened) == 2
    run()
    assert len(opened) == 2, "the first one's is still there"


def test_options_of_one_run_do_not_matter(opened: list[Bus], tmp_path: Path) -> None:
    run()
    run_pipelined(LAYER, X, tmp_path / "y.npy", devices=["cpu"], chunk_rows=16, progress=lambda _: None)
    run_pipelined(LAYER, X, tmp_path / "y.npy", devices=["cpu"], chunk_rows=16, overwrite=True)
    assert len(opened) == 1


def test_changed_environment_variable_gets_its_own(opened: list[Bus], monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setenv("PIPELINE_COPY_WORKERS", "1")
    assert "copy workers: 1 " in run_pipelined(LAYER, X, devices="cpu", chunk_rows=16).stats.copy_workers
    assert len(opened) == 2


def test_another_layer_and_a_changed_one_get_their_own(opened: list[Bus]) -> None:
    layer = random_layer(12, 7, seed=5)
    run(layer)
    run(LAYER)
    assert len(opened) == 2
    layer.scaling_factor = 3.0
    run(layer)
    layer.epilogue = SigmoidScaleResidual(0.5)
    run(layer)
    assert len(opened) == 4


def test_weights_that_are_set_anew_are_refused() -> None:
    """Copies on devices would be the old ones."""
    layer = random_layer(12, 7)
    for name in ("weight", "bias", "precision", "dtype", "in_features"):
        with pytest.raises(AttributeError, match=f"{name} can't be set.*make a new FusedLinear"):
            setattr(layer, name, getattr(layer, name))


def test_half_open_devices_are_not_kept(opened: list[Bus], monkeypatch: pytest.MonkeyPatch) -> None:
    """One device is open, the other one isn't yet when the run fails, and then lacks memory."""
    failed, first = threading.Event(), threading.Event()

    def open_device(name: str) -> Bus:
        if first.is_set():
            assert failed.wait(20)
            raise DeviceMemoryError("planned")
        first.set()
        return Bus()

    def fail(*_: Any) -> Any:
        assert first.wait(20)
        failed.set()
        raise PlannedError

    monkeypatch.setattr("pipeline.fleet.open_device", open_device)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.open_source", fail)
        with pytest.raises(PlannedError):
            run_pipelined(LAYER, X, devices=["cpu", "sim"], chunk_rows=16)
    assert opened[0].closed and not kept.KEPT.release()
    monkeypatch.setattr("pipeline.fleet.open_device", lambda name: Bus())
    run()


def test_layer_that_changes_while_devices_are_opened_is_not_kept(
    opened: list[Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(12, 7, seed=4)
    before = layer.epilogue

    def open_device(name: str) -> Bus:
        layer.epilogue = SigmoidScaleResidual(100.0)
        return Bus()

    monkeypatch.setattr("pipeline.fleet.open_device", open_device)
    run_pipelined(layer, X, devices="cpu", chunk_rows=16)
    layer.epilogue = before
    monkeypatch.setattr("pipeline.fleet.open_device", lambda name: Bus())
    assert_same_bits(run_pipelined(layer, X, devices="cpu", chunk_rows=16).out, layer(X))


def test_nothing_is_kept_where_no_thread_can_watch_it(opened: list[Bus], monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "pipeline-keeper":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        run()
    assert opened[0].closed
    run()
    run()
    assert len(opened) == 2, "kept again"


def test_layer_that_dies_takes_its_devices_along(opened: list[Bus]) -> None:
    layer = random_layer(12, 7)
    run(layer)
    died = weakref.ref(layer)
    del layer
    gc.collect()
    assert died() is None, "what is kept doesn't keep the layer"
    assert wait_until(lambda: opened[0].closed)


def test_callers_arrays_are_not_kept(opened: list[Bus]) -> None:
    x = X.copy()
    out = run_pipelined(LAYER, x, devices="cpu", chunk_rows=16).out
    died = weakref.ref(x), weakref.ref(out)
    del x, out
    gc.collect()
    assert all(each() is None for each in died)


def test_idle_devices_are_closed_and_the_thread_that_watches_ends(
    opened: list[Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.api.KEPT", kept.KeptFleets(idle_s=0.05))
    run()
    assert wait_until(lambda: opened[0].closed)
    assert wait_until(lambda: "pipeline-keeper" not in pipeline_threads())
    run()
    assert len(opened) == 2 and wait_until(lambda: opened[1].closed), "another thread watches"


def test_no_more_are_kept_than_the_bounds_allow(opened: list[Bus], monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [random_layer(12, 7, seed=seed) for seed in range(kept.MOST_FLEETS + 1)]
    for layer in layers:
        run(layer)
    assert [device.closed for device in opened] == [True] + [False] * kept.MOST_FLEETS
    run(layers[1])
    assert len(opened) == len(layers), "what was used lately is there"
    monkeypatch.setattr(kept, "MOST_DEVICE_BYTES", 2 * 1000)
    run(layers[1])
    assert [device.closed for device in opened[1:]] == [False, True, True, False]


@pytest.mark.parametrize("bound", ["MOST_DEVICE_BYTES", "MOST_PINNED_BYTES"])
def test_what_is_larger_than_the_bounds_is_not_kept(
    opened: list[Bus], bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, bound, 1)
    run()
    assert opened[0].closed


def test_short_memory_closes_what_is_kept_and_tries_again(opened: list[Bus], monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    first = opened[0]
    monkeypatch.setattr(Bus, "free_bytes", lambda self: 10**9 if first.closed else 0)
    other = random_layer(12, 7, seed=8)
    run(other)
    assert first.closed and len(opened) == 3, "opened, failed, opened again"
    monkeypatch.setattr(Bus, "free_bytes", lambda self: 0)
    release()
    with pytest.raises(DeviceMemoryError):
        run(other)


def test_errors_of_the_caller_leave_what_is_kept(opened: list[Bus]) -> None:
    run()

    def fail(progress: Any) -> None:
        raise PlannedError

    for source, options in ((X[:, :5], {}), (X, {"progress": fail})):
        with pytest.raises((InputError, PlannedError)):
            run_pipelined(LAYER, source, devices="cpu", chunk_rows=16, **options)
    run()
    assert len(opened) == 1


@pytest.mark.parametrize("error", [DeviceError("planned"), KeyboardInterrupt()])
def test_failed_device_and_interrupted_run_are_not_kept(opened: list[Bus], error: BaseException) -> None:
    def fail(progress: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        run_pipelined(LAYER, X, devices="cpu", chunk_rows=16, progress=fail)
    assert opened[0].closed
    run()


def test_calls_at_the_same_time_share_nothing(opened: list[Bus]) -> None:
    both = threading.Barrier(2)
    met = threading.Event()

    def meet(progress: Any) -> None:
        if not met.is_set():
            both.wait(20)
            met.set()

    results: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                run_pipelined(LAYER, X, devices="cpu", chunk_rows=16, progress=meet).out.copy()
            )
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 2 and len(results) == 2
    for result in results:
        assert_same_bits(result, LAYER(X))
    run()
    assert len(opened) == 2


def test_iterable_is_not_asked_for_rows_where_no_device_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise DeviceMemoryError("planned")

    monkeypatch.setattr("pipeline.fleet.open_device", fail)
    batches = iter([X[:20], X[20:]])
    with nothing_left_behind(), pytest.raises(DeviceMemoryError, match="planned"):
        run_pipelined(LAYER, batches, devices="cpu")
    assert next(batches) is not None and len(next(batches)) == len(X) - 20, "no batch is lost"


def test_device_that_fails_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise DeviceMemoryError("planned")

    monkeypatch.setattr("pipeline.fleet.open_device", fail)
    (tmp_path / "old.npy").write_bytes(b"old")
    with nothing_left_behind(tmp_path), pytest.raises(DeviceMemoryError, match="planned"):
        run_pipelined(LAYER, X, tmp_path / "old.npy", devices="cpu", overwrite=True)
    assert (tmp_path / "old.npy").read_bytes() == b"old"


def _run_in_child(answers: Any) -> None:
    x = random_rows(40, 12)
    with nothing_left_behind():
        same = np.array_equal(run_pipelined(LAYER, x, devices="cpu", chunk_rows=16).out, LAYER(x))
    answers.put((same, len(Bus.opened)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_starts_anew(opened: list[Bus]) -> None:
    run()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_run_in_child, args=(answers,))
    child.start()
    assert answers.get(timeout=60) == (True, 2)
    child.join()
    assert child.exitcode == 0
    run()
    assert len(opened) == 1, "the parent's is as it was"


def test_interpreter_exit_ends_what_is_kept() -> None:
    program = """
import numpy as np
from pipeline import FusedLinear, run_pipelined
from pipeline.devices.cpu import CpuDevice
CpuDevice.has_bus = True
close = CpuDevice.close
CpuDevice.close = lambda self: (close(self), print("closed"))
x = np.ones((50, 4), np.float32)
layer = FusedLinear(np.ones((3, 4), np.float32))
run_pipelined(layer, x, devices="cpu")
print("end")
"""
    environment = {**os.environ, "PIPELINE_TUNE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, env=environment, check=True
    )
    assert done.stdout.split() == ["end", "closed"] and not done.stderr
