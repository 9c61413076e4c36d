"""`Pipeline` and `run_pipelined`: options, figures, reuse, streams, threads, memory."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from device_tests import (
    PlannedError,
    assert_close,
    assert_same_bits,
    batches_of,
    nothing_left_behind,
    pipeline_threads,
    poisoned,
    random_layer,
    random_rows,
    small_rings,
    wait_until,
)

from pipeline import FusedLinear, Pipeline, Result, pin, run_pipelined
from pipeline.devices.cpu import CpuDevice
from pipeline.devices.cuda import count_gpus
from pipeline.devices.names import open_device
from pipeline.devices.sim import Hardware, SimDevice
from pipeline.errors import DeviceMemoryError, DeviceNotFoundError, DTypeError, InputError, OptionError, PipelineError
from pipeline.instrument import STAGES

LAYER = random_layer(12, 7)
X = random_rows(200, 12)


def open_pipeline(layer: FusedLinear = LAYER, **options: Any) -> Pipeline:
    return Pipeline(layer, **{"devices": "cpu", "chunk_rows": 16, "num_streams": 3, **options})


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 1.0, "many", "4", "", True, False, None, [1], np.float32(2), np.bool_(True)])
@pytest.mark.parametrize("name", ["chunk_rows", "num_streams"])
def test_pipeline_refuses_sizes_that_are_none(name: str, value: Any) -> None:
    with nothing_left_behind(), pytest.raises(OptionError, match=f"{name} is .*expected 'auto' or a whole number"):
        Pipeline(LAYER, devices="cpu", **{name: value})


@pytest.mark.parametrize("value", [1, 17, np.int64(5), "auto"])
@pytest.mark.parametrize("name", ["chunk_rows", "num_streams"])
def test_pipeline_takes_whole_numbers_and_auto(name: str, value: Any) -> None:
    with Pipeline(LAYER, devices="cpu", **{name: value}) as pipeline:
        result = pipeline.run(X)
    assert_same_bits(result.out, LAYER(X))
    if value != "auto":
        assert getattr(result.stats, name) == int(value)


@pytest.mark.parametrize("layer", [None, torch.nn.Linear(3, 2), np.zeros((3, 2))])
def test_pipeline_refuses_what_is_no_layer(layer: Any) -> None:
    with pytest.raises(OptionError, match=r"expected a FusedLinear.*from_linear"):
        run_pipelined(layer, X, devices="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progress": 3}, "progress is 3, expected a function that takes a Progress, or None"),
        ({"trace": 3}, "trace is 3, expected a path"),
        ({"trace": b"run.json"}, "trace is b'run.json', expected a path"),
        ({"overwrite": "no"}, "overwrite is 'no', expected True or False"),
    ],
)
def test_run_refuses_options_before_it_starts(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "y.npy").write_bytes(b"precious")
    with nothing_left_behind(tmp_path), open_pipeline() as pipeline:
        with pytest.raises(OptionError, match=message):
            pipeline.run(X, tmp_path / "y.npy", **options)
    assert (tmp_path / "y.npy").read_bytes() == b"precious"


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


def test_pipeline_memory_check_names_what_would_fit() -> None:
    with pytest.raises(DeviceMemoryError, match=r"free: pass fewer num_streams$"):
        open_pipeline(num_streams=10**12)


def test_result_can_be_pickled_and_read_after_its_pipeline_is_closed() -> None:
    with open_pipeline() as pipeline:
        result = pipeline.run(X)
        copy = pickle.loads(pickle.dumps(result))
    assert_same_bits(copy.out, LAYER(X))
    assert copy.stats == result.stats and copy.stats.rows == len(X) and "stats" not in repr(result)


def test_pipeline_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        Pipeline(LAYER, 16)  # type: ignore[misc]
    with pytest.raises(TypeError):
        run_pipelined(LAYER, X, None, 16)  # type: ignore[misc]


@pytest.mark.parametrize("devices,most", [(["cpu"], 2**20), (["cuda:0"], 65_536), (["sim", "cpu"], 65_536)])
@pytest.mark.parametrize("in_features,out_features", [(1, 1), (300, 20), (4096, 8192), (1_000_000, 1)])
def test_pipeline_auto_chunk_is_about_32_mib_of_the_wider_side(
    in_features: int, out_features: int, devices: list[str], most: int
) -> None:
    from pipeline.api import _auto_chunk_rows

    layer = FusedLinear(np.broadcast_to(np.float32(0), (out_features, in_features)))
    rows = _auto_chunk_rows(layer, layer.dtype, layer.dtype, devices)
    assert rows % 128 == 0 and 128 <= rows <= most
    assert rows == 128 or rows * 4 * max(in_features, out_features) <= 32 * 2**20


@pytest.mark.parametrize("name", ["PIPELINE_PIECE_BYTES", "PIPELINE_RING_PIECES", "PIPELINE_COPY_WORKERS"])
@pytest.mark.parametrize("value", ["0", "many", "-1", "1.5"])
def test_pipeline_bad_environment_is_named_and_leaves_no_thread(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with nothing_left_behind(), pytest.raises(OptionError, match=f"{name} is '{value}', expected a whole number"):
        open_pipeline()


def test_pipeline_chunk_that_does_not_fit_is_refused_by_name() -> None:
    with nothing_left_behind(), pytest.raises(DeviceMemoryError, match=f"{10**17} rows"):
        open_pipeline(chunk_rows=10**17)


def test_pipeline_memory_check_names_the_rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda self: 100_000)
    with nothing_left_behind(), pytest.raises(DeviceMemoryError, match=r"pass chunk_rows=\d+ or less") as caught:
        open_pipeline(chunk_rows=10_000)
    rows = int(str(caught.value).split("chunk_rows=")[1].split()[0])
    with open_pipeline(chunk_rows=rows) as pipeline:
        assert_same_bits(pipeline.run(X).out, LAYER(X))


def test_pipeline_second_device_that_fails_closes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        if name == "sim":
            raise PlannedError
        return open_device(name)

    monkeypatch.setattr("pipeline.api.open_device", fail)
    with nothing_left_behind(), pytest.raises(PlannedError):
        open_pipeline(devices=["cpu", "sim"])


# -- results and figures -----------------------------------------------------------------------------------------------


def test_run_pipelined_is_the_public_function() -> None:
    result = run_pipelined(LAYER, X, devices="cpu")
    assert isinstance(result, Result)
    assert_close(result.out, LAYER, X)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_stats_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch, 500)
    x, out = np.asfortranarray(X), np.asfortranarray(poisoned((200, 7)))
    with open_pipeline(devices=device) as pipeline:
        stats = pipeline.run(x, out).stats
        again = pipeline.run(x, out).stats
    assert stats.rows == 200 and stats.chunks == 13 and stats.chunk_rows == 16 and stats.num_streams == 3
    assert stats.bytes_in == x.nbytes and stats.bytes_out == out.nbytes
    assert stats.rows_per_s == pytest.approx(200 / stats.seconds)
    assert stats.gb_per_s_in == pytest.approx(x.nbytes / stats.seconds / 1e9)
    assert list(stats.stages) == list(STAGES)
    for name in ("fill", "H2D"):
        assert stats.stages[name].bytes == x.nbytes
    for name in ("D2H", "drain"):
        assert stats.stages[name].bytes == out.nbytes
    for stage in stats.stages.values():
        assert 0 < stage.busy_s <= stats.seconds * 1.001 and 0 < stage.busy_share <= 1.001
        assert stage.count >= 13
    assert stats.bound == max(stats.stages, key=lambda name: stats.stages[name].busy_share)
    assert stats.kernel_hidden_share is not None and 0 <= stats.kernel_hidden_share <= 1
    assert stats.copy_hidden_share is not None and 0 <= stats.copy_hidden_share <= 1
    assert list(stats.devices) == [device] and stats.kernel and stats.copy_workers and stats.source == "NumPy array"
    assert stats.precision == "fp32" and stats.runs_as == "ieee"
    assert stats.pinned_bytes == again.pinned_bytes > 0
    assert again.rows == 200 and again.stages["H2D"].bytes == x.nbytes, "a run's figures are its own"
    assert json.loads(json.dumps(stats.as_dict()))["stages"]["fill"]["bytes"] == x.nbytes
    text = str(stats)
    assert "200 rows" in text and f"bound by {stats.bound}" in text and device in text


@pytest.mark.parametrize(
    ("stage", "hardware"),
    [
        ("H2D", {"h2d_rate": 1e5}),
        ("D2H", {"d2h_rate": 1e5}),
        ("kernel", {"flop_rate": 1e5}),
        ("fill", {"copy_rate": 1e6, "copy_threads": 1}),
    ],
)
def test_stats_name_the_stage_that_bounds_the_run(
    stage: str, hardware: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On simulated hardware with one slow part, that part is busy nearly all the time."""
    small_rings(monkeypatch, 500)
    monkeypatch.setattr("pipeline.api.open_device", lambda name: SimDevice(Hardware(latency_s=0.0, **hardware)))
    out: Any = None
    with open_pipeline(devices="sim") as pipeline:
        if stage == "fill":  # nothing to drain, so that one worker has the fills alone
            lane = pipeline._lanes[0].device
            assert isinstance(lane, SimDevice)
            out = lane.pin(poisoned((200, 7)))
        stats = pipeline.run(X, out).stats
    assert stats.bound == stage
    assert stats.stages[stage].busy_share > 0.8


def test_stats_without_copies_by_workers_have_no_fill_and_no_drain() -> None:
    with open_pipeline() as pipeline:
        stats = pipeline.run(X).stats
    assert stats.stages["fill"].count == stats.stages["drain"].count == 0
    assert stats.pinned_bytes == 0


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


def test_debug_mode_poisons_buffers_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEBUG", "1")
    small_rings(monkeypatch, 500)
    with open_pipeline() as pipeline:
        assert_same_bits(pipeline.run(np.asfortranarray(X), np.asfortranarray(poisoned((200, 7)))).out, LAYER(X))
        assert all((memory == 0xFF).all() for memory in pipeline._lanes[0].movers.rings["Python"].load._memory)


# -- several devices ---------------------------------------------------------------------------------------------------


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
        device = next(lane.device for lane in pipeline._lanes if lane.device.name == broken)
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
        sim = pipeline._lanes[1].device
        idle = sim.idle
        monkeypatch.setattr(sim, "idle", lambda: (time.sleep(0.02), idle()))
        monkeypatch.setattr(threading.Thread, "join", interrupt_once)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(X, tmp_path / "y.npy")
        assert interrupted == [True], "the test wants the other device at work"
        assert list(tmp_path.iterdir()) == [] and "pipeline-sim" not in pipeline_threads()
        assert_same_bits(pipeline.run(X).out, LAYER(X))


# -- one Pipeline, many runs -------------------------------------------------------------------------------------------


def test_pipeline_is_used_again_with_any_source() -> None:
    with nothing_left_behind(), open_pipeline() as pipeline:
        for rows in (200, 1, 0, 77, 16, 200):
            x = random_rows(rows, 12, seed=rows)
            for source in (x, np.asfortranarray(x), torch.from_numpy(x), batches_of(x, [9])):
                out = pipeline.run(source).out
                assert tuple(out.shape) == (rows, 7)
                if rows:
                    assert_same_bits(out, LAYER(x))


def test_pipeline_results_are_independent_arrays() -> None:
    with open_pipeline() as pipeline:
        first, second = pipeline.run(X).out, pipeline.run(X + 1).out
        assert_same_bits(first, LAYER(X))
        assert not np.shares_memory(first, second)


def test_pipeline_closed_is_said_so() -> None:
    with nothing_left_behind():
        pipeline = open_pipeline()
        pipeline.run(X)
        pipeline.close()
        pipeline.close()
        with pytest.raises(PipelineError, match="closed; make a new one"):
            pipeline.run(X)
        with pytest.raises(PipelineError, match="closed; make a new one"):
            next(pipeline.stream([X]))


def test_result_keeps_neither_device_nor_weights() -> None:
    pipeline = open_pipeline(random_layer(12, 7))
    result = pipeline.run(X)
    kept = [weakref.ref(pipeline._lanes[0].device), weakref.ref(pipeline.layer)]
    pipeline.close()
    del pipeline
    gc.collect()
    assert [each() for each in kept] == [None, None] and result.stats.rows == 200


@pytest.mark.parametrize("use", ["run", "stream", "close", "exit"])
def test_pipeline_in_a_forked_process_says_so_and_ends(use: str) -> None:
    """Its threads, and those of the copy workers, aren't there."""
    script = f"""
        import os, sys
        import numpy as np
        from pipeline import FusedLinear, Pipeline, PipelineError
        layer, x = FusedLinear(np.ones((7, 12), np.float32)), np.asfortranarray(np.ones((200, 12), np.float32))
        pipeline = Pipeline(layer, devices="cpu", chunk_rows=16)
        pipeline.run(x)
        if os.fork() == 0:
            use = {use!r}
            if use in ("run", "stream"):
                try:
                    pipeline.run(x) if use == "run" else list(pipeline.stream([x]))
                except PipelineError as error:
                    assert "forked" in str(error)
            if use == "close":
                pipeline.close()
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
        assert pipeline.run(x).stats.rows == 200
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_pipeline_busy_is_said_so() -> None:
    def again(progress: Any) -> None:
        with pytest.raises(PipelineError, match="is running already"):
            pipeline.run(X)
        with pytest.raises(PipelineError, match="is running; close it when its run is done"):
            pipeline.close()

    with open_pipeline() as pipeline:
        pipeline.run(X, progress=again)
        results = pipeline.stream([X, X])
        next(results)
        with pytest.raises(PipelineError, match="finish or close its stream first"):
            pipeline.run(X)
        results.close()
        assert_same_bits(pipeline.run(X).out, LAYER(X))


def test_pipeline_runs_in_a_background_thread() -> None:
    results: list[Any] = []
    with nothing_left_behind(), open_pipeline() as pipeline:
        thread = threading.Thread(target=lambda: results.append(pipeline.run(batches_of(X, [33])).out))
        thread.start()
        thread.join()
    assert_same_bits(results[0], LAYER(X))


def test_pipeline_many_at_once_in_threads() -> None:
    failures: list[BaseException] = []

    def job(seed: int) -> None:
        try:
            x = random_rows(150, 12, seed=seed)
            with open_pipeline(devices="cpu" if seed % 2 else "sim") as pipeline:
                for _ in range(3):
                    assert_same_bits(pipeline.run(x).out, LAYER(x))
                    assert_same_bits(pipeline.run(batches_of(x, [20])).out, LAYER(x))
        except BaseException as error:
            failures.append(error)

    with nothing_left_behind():
        threads = [threading.Thread(target=job, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_pipeline_interrupt_leaves_it_ready() -> None:
    """A real SIGINT in the middle of a run."""
    main = threading.get_ident()

    def kill(progress: Any) -> None:
        if progress.rows_done == 64:
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.01)

    with nothing_left_behind(), open_pipeline() as pipeline:
        for source in (X, batches_of(X, [10])):
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(source, progress=kill)
            assert_same_bits(pipeline.run(X).out, LAYER(X))


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_stream_keeps_sizes_and_order(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    sizes = np.random.default_rng(3).integers(0, 60, 40).tolist()
    x = random_rows(sum(sizes), 12)
    edges = np.cumsum([0, *sizes])
    with nothing_left_behind(), open_pipeline(devices=device) as pipeline:
        results = list(pipeline.stream(x[a:b] for a, b in pairwise(edges)))
    assert [len(result) for result in results] == sizes
    assert_same_bits(np.concatenate(results), LAYER(x))


def test_stream_of_tensors_gives_tensors_of_the_out_dtype() -> None:
    with open_pipeline(out_dtype="bfloat16") as pipeline:
        results = list(pipeline.stream(torch.from_numpy(X).split(30)))
    assert all(result.dtype == torch.bfloat16 for result in results)
    assert_same_bits(torch.cat(results), LAYER(X, out=torch.empty(200, 7, dtype=torch.bfloat16)))


def test_stream_results_come_as_soon_as_their_batch_is_done() -> None:
    """A consumer that asks for the first result while the source waits for it: no deadlock."""
    answered: list[int] = []

    def batches() -> Iterator[Any]:
        for number in range(5):
            assert wait_until(lambda number=number: len(answered) >= number)
            yield X[:10]

    with open_pipeline() as pipeline:
        for result in pipeline.stream(batches()):
            assert_same_bits(result, LAYER(X[:10]))
            answered.append(1)
    assert len(answered) == 5


def test_stream_error_comes_after_the_results_before_it() -> None:
    def batches() -> Iterator[Any]:
        for _ in range(6):
            yield X
        raise PlannedError

    got = 0
    with nothing_left_behind(), open_pipeline() as pipeline:
        with pytest.raises(PlannedError):
            for result in pipeline.stream(batches()):
                assert_same_bits(result, LAYER(X))
                got += 1
        assert got == 6
        assert_same_bits(pipeline.run(X).out, LAYER(X))


@pytest.mark.parametrize("source", [X, torch.from_numpy(X), "x.npy", 5])
def test_stream_takes_batches_only(source: Any, tmp_path: Path) -> None:
    if isinstance(source, str):
        np.save(tmp_path / "x.npy", X)
        source = tmp_path / "x.npy"
    with nothing_left_behind(), open_pipeline() as pipeline:
        with pytest.raises(PipelineError, match=r"use run\(\) for it|expected a NumPy array"):
            next(pipeline.stream(source))
        assert_same_bits(pipeline.run(X).out, LAYER(X))


def test_stream_of_nothing_ends_at_once() -> None:
    with open_pipeline() as pipeline:
        assert list(pipeline.stream([])) == []
        assert [len(result) for result in pipeline.stream([X[:0], X[:0]])] == [0, 0]


def test_stream_consumer_that_raises_ends_it() -> None:
    with nothing_left_behind(), open_pipeline() as pipeline:
        with pytest.raises(PlannedError):
            for _ in pipeline.stream(X for _ in range(100)):
                raise PlannedError
        assert_same_bits(pipeline.run(X).out, LAYER(X))


def test_stream_left_open_is_ended_by_close() -> None:
    """`close` frees the buffers, so the run that uses them ends first; the iterator then says why it is over."""
    with nothing_left_behind():
        with open_pipeline() as pipeline:
            results = pipeline.stream(X for _ in range(10**9))
            assert_same_bits(next(results), LAYER(X))
        assert pipeline_threads() == []
        with pytest.raises(PipelineError, match="closed while this stream was open"):
            for result in results:
                assert_same_bits(result, LAYER(X))


def test_stream_left_open_lets_the_interpreter_exit() -> None:
    code = """
        import numpy as np
        from pipeline import FusedLinear, Pipeline
        pipeline = Pipeline(FusedLinear(np.ones((3, 4), np.float32)), devices="cpu", chunk_rows=16)
        def batches():
            while True:
                yield np.ones((40, 4), np.float32)
        results = pipeline.stream(batches())
        print(next(results).shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "(40, 3)" and done.stderr == ""


def test_pipeline_left_open_lets_the_interpreter_exit() -> None:
    code = """
        import numpy as np
        from pipeline import FusedLinear, Pipeline
        pipeline = Pipeline(FusedLinear(np.ones((3, 4), np.float32)), devices=["cpu", "sim"])
        print(pipeline.run(np.ones((40, 4), np.float32)).out.shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "(40, 3)" and done.stderr == ""


# -- memory ------------------------------------------------------------------------------------------------------------


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


def test_memory_of_a_stream_is_bounded_by_what_is_read_ahead() -> None:
    """100 MB through a pipeline of 0.5 MB chunks: the peak stays far below the dataset."""
    layer, x = random_layer(256, 256), random_rows(512, 256)
    process = psutil.Process()
    with Pipeline(layer, devices="cpu", chunk_rows=512, num_streams=2) as pipeline:
        list(pipeline.stream([x] * 10))
        before, peak = process.memory_info().rss, 0
        for result in pipeline.stream(x + 0 for _ in range(200)):
            peak = max(peak, process.memory_info().rss)
            assert len(result) == 512
    assert peak - before < 30e6


# -- pin ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [X[:, ::2], X.astype(">f4"), np.asfortranarray(X)])
def test_pin_of_memory_that_would_be_staged_anyway_is_refused(array: Any) -> None:
    with pytest.raises(OptionError, match=r"the array to pin has strides .*expected a contiguous one"):
        pin(array)


def test_pin_without_a_gpu_says_so() -> None:
    if count_gpus():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceNotFoundError):
        pin(X)


def test_api_has_no_thread_and_no_file_open_at_the_end_of_these_tests() -> None:
    gc.collect()
    assert wait_until(lambda: pipeline_threads() == [])
    assert not [file for file in psutil.Process(os.getpid()).open_files() if file.path.endswith((".npy", ".partial"))]
