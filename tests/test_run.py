"""One pass: several devices, progress, errors, interrupts, memory."""

from __future__ import annotations

import gc
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers.data import assert_same_bits, batches_of, random_layer, random_rows
from helpers.leaks import PlannedError, nothing_left_behind, pipeline_threads, small_rings
from helpers.pipelines import LAYER, X, open_pipeline

from pipeline import Pipeline, run_pipelined
from pipeline.devices.base import Device
from pipeline.devices.names import open_device
from pipeline.errors import DTypeError, InputError
from pipeline.io.memory import GrowingSink


def test_run_refuses_a_generator_that_was_used() -> None:
    """It would pass for an empty dataset."""
    batches = (X for _ in range(2))
    with open_pipeline() as pipeline:
        assert len(pipeline.run(batches).out) == 400
        with pytest.raises(InputError, match="generator that has ended already, expected a new one"):
            pipeline.run(batches)
        with pytest.raises(InputError, match="generator that has ended already"):
            next(pipeline.stream(batches))
        assert len(pipeline.run(x for x in ()).out) == 0


@pytest.mark.parametrize("kind", ["array", "iterable"])
def test_progress_counts_up_to_the_end(kind: str) -> None:
    seen: list[Any] = []
    with open_pipeline() as pipeline:
        pipeline.run(X if kind == "array" else batches_of(X, [31]), progress=seen.append)
    assert [p.rows_done for p in seen] == sorted({p.rows_done for p in seen})
    assert seen[-1].rows_done == 200 and len(seen) == 13
    assert {p.rows_total for p in seen} == {200 if kind == "array" else None}
    assert all(a.elapsed_s <= b.elapsed_s for a, b in pairwise(seen))
    assert seen[-1].rows_per_s > 0


def test_result_of_bfloat16_without_ml_dtypes_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with open_pipeline(out_dtype="bfloat16") as pipeline:
        with pytest.raises(DTypeError, match=r"NumPy has no bfloat16.*torch tensors"):
            pipeline.run(X, progress=lambda progress: pytest.fail("work was done"))
        with pytest.raises(DTypeError, match="NumPy has no bfloat16"):
            next(pipeline.stream([X]))
        assert pipeline.run(torch.from_numpy(X)).out.dtype == torch.bfloat16


@pytest.mark.parametrize("source", ["array", "iterable", "stream", "path"])
def test_devices_share_a_run_with_the_same_bits(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch, 500)
    x = random_rows(3000, 12)
    np.save(tmp_path / "x.npy", x)
    with nothing_left_behind(tmp_path), open_pipeline(devices=["cpu", "sim"]) as pipeline:
        if source == "stream":
            out = np.concatenate(list(pipeline.stream(batches_of(x, [50]))))
        elif source == "path":
            result = pipeline.run(tmp_path / "x.npy", tmp_path / "y.npy")
            out = np.load(result.out)
            assert list(result.stats.devices) == ["cpu", "sim"]
        else:
            result = pipeline.run(x if source == "array" else batches_of(x, [50]))
            out = result.out
            assert result.stats.rows == 3000
        assert_same_bits(out, LAYER(x))


@pytest.mark.parametrize("broken", ["cpu", "sim"])
def test_devices_one_fails_and_the_other_ends_too(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    x = random_rows(3000, 12)
    with nothing_left_behind(), open_pipeline(devices=["cpu", "sim"]) as pipeline:
        device = next(station.device for station in pipeline.fleet.stations if station.device.name == broken)
        compute = device.compute

        def refuse(*arguments: Any) -> Any:
            monkeypatch.setattr(device, "compute", compute)
            raise PlannedError

        monkeypatch.setattr(device, "compute", refuse)
        with pytest.raises(PlannedError):
            pipeline.run(x)
        assert_same_bits(pipeline.run(x).out, LAYER(x))


def test_devices_interrupt_while_waiting_for_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other device's thread still writes to the file: it is waited for before the file is closed."""
    small_rings(monkeypatch)
    join = threading.Thread.join
    interrupted = []

    def interrupt_once(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "pipeline-sim" and not interrupted:
            interrupted.append(self.is_alive())
            raise KeyboardInterrupt
        join(self, timeout)

    with nothing_left_behind(tmp_path), open_pipeline(devices=["cpu", "sim"]) as pipeline:
        sim = pipeline.fleet.stations[1].device
        idle = sim.idle
        monkeypatch.setattr(sim, "idle", lambda: (time.sleep(0.02), idle()))
        monkeypatch.setattr(threading.Thread, "join", interrupt_once)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(X, tmp_path / "y.npy")
        assert interrupted == [True], "the test wants the other device at work"
        assert list(tmp_path.iterdir()) == [] and "pipeline-sim" not in pipeline_threads()
        assert_same_bits(pipeline.run(X).out, LAYER(X))


def test_run_ends_the_reader_of_an_iterable_where_the_sink_cannot_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that ended the run comes first."""

    def fails(name: str) -> Callable[..., None]:
        def fail(*_: Any) -> None:
            raise PlannedError(name)

        return fail

    for name in ("commit", "stop"):
        monkeypatch.setattr(GrowingSink, name, fails(name))
    with nothing_left_behind():
        with open_pipeline() as pipeline:
            with pytest.raises(PlannedError, match="commit"):
                pipeline.run(X for _ in range(1_000_000))


def test_pipeline_interrupt_leaves_it_ready() -> None:
    """A real SIGINT in the middle of a run."""
    main = threading.get_ident()

    def interrupt(progress: Any) -> None:
        if progress.rows_done == 64:
            signal.pthread_kill(main, signal.SIGINT)
            threading.Event().wait(60)  # the interrupt ends this

    with nothing_left_behind(), open_pipeline() as pipeline:
        for source in (X, batches_of(X, [10])):
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(source, progress=interrupt)
            assert_same_bits(pipeline.run(X).out, LAYER(X))


@pytest.mark.parametrize("kind", ["array", "iterable", "stream", "path", "failure", "new pipeline"])
def test_memory_stays_flat_over_50_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run moves 2 MB; what it leaves behind after a warm-up must be far less than one run's data."""
    small_rings(monkeypatch, 50_000)
    layer, x = random_layer(64, 64), random_rows(4000, 64)
    np.save(tmp_path / "x.npy", x)

    def fail(progress: Any) -> None:
        if progress.rows_done > 2000:
            raise PlannedError

    def failure(pipeline: Pipeline) -> None:
        with pytest.raises(PlannedError):
            pipeline.run(np.asfortranarray(x), progress=fail)

    def afresh(pipeline: Pipeline) -> None:
        with Pipeline(layer, devices="cpu", chunk_rows=256) as another:
            another.run(x)

    runs: dict[str, Callable[[Pipeline], Any]] = {
        "array": lambda pipeline: pipeline.run(np.asfortranarray(x)),
        "iterable": lambda pipeline: pipeline.run(batches_of(x, [300])),
        "stream": lambda pipeline: sum(len(result) for result in pipeline.stream(batches_of(x, [300]))),
        "path": lambda pipeline: pipeline.run(tmp_path / "x.npy", tmp_path / "y.npy", overwrite=True),
        "failure": failure,
        "new pipeline": afresh,
    }
    process = psutil.Process()
    with nothing_left_behind(tmp_path), Pipeline(layer, devices="cpu", chunk_rows=256) as pipeline:
        for _ in range(15):
            runs[kind](pipeline)
        gc.collect()
        resident = [process.memory_info().rss]
        fds = process.num_fds()
        for _ in range(5):
            for _ in range(10):
                runs[kind](pipeline)
            gc.collect()
            resident.append(process.memory_info().rss)
        assert process.num_fds() == fds
    # A leak grows in every batch of runs; an allocator's late arena is one step.
    growth = statistics.median(np.diff(resident)) / 10
    assert growth < x.nbytes / 10, f"{growth / 1e3:.0f} kB more a run: {[r // 2**20 for r in resident]} MiB"


# -- seconds -----------------------------------------------------------------------------------------------------------


def test_seconds_count_from_the_call_and_tell_setup_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the device takes 0.2 s, which a Pipeline takes once and `run_pipelined` in its call."""

    def open_slowly(name: str) -> Device:
        time.sleep(0.2)
        return open_device(name)

    monkeypatch.setattr("pipeline.fleet.open_device", open_slowly)
    start_s = time.perf_counter()
    cold = run_pipelined(LAYER, X, devices="cpu").stats
    taken_s = time.perf_counter() - start_s
    assert 0.2 <= cold.setup_s <= cold.seconds <= taken_s
    assert cold.seconds == cold.setup_s + cold.run_s + cold.finish_s
    assert cold.rows_per_s == pytest.approx(len(X) / cold.seconds)
    assert cold.bound == "set-up" and "bound by set-up" in str(cold) and "set-up 0." in str(cold)
    with open_pipeline() as pipeline:
        assert pipeline.run(X).stats.setup_s < 0.1


def test_seconds_until_an_iterable_gives_its_first_batch_are_set_up() -> None:
    """Opening it asks for that batch, and the advice names it."""

    def batches() -> Any:
        time.sleep(0.2)
        yield X

    with open_pipeline() as pipeline:
        stats = pipeline.run(batches()).stats
    assert stats.setup_s >= 0.2 and stats.bound == "set-up" and "first batch sooner" in stats.advice


def test_seconds_of_a_clock_of_its_own_are_that_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated device's: the same in every run, whatever the host took."""
    small_rings(monkeypatch)
    found = []
    for _ in range(2):
        with open_pipeline(devices="sim") as pipeline:
            stats = pipeline.run(X).stats
        found.append((stats.seconds, stats.setup_s, stats.run_s, stats.finish_s))
    assert found[0] == found[1] and found[0][1] == found[0][3] == 0 < found[0][2]


def test_seconds_of_devices_with_different_clocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    for devices in (["cpu", "sim"], ["sim", "cpu"]):
        with open_pipeline(devices=devices) as pipeline:
            stats = pipeline.run(X).stats
        assert min(stats.setup_s, stats.run_s, stats.finish_s) >= 0
        assert stats.seconds == stats.setup_s + stats.run_s + stats.finish_s
        assert all(stage.busy_share <= 1 for stage in stats.stages.values())
