"""`Pipeline` and `run_pipelined`: results, reuse, exclusive use, forks, threads, ends."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers.data import assert_close, assert_same_bits, batches_of, random_rows
from helpers.leaks import nothing_left_behind, pipeline_threads, wait_until
from helpers.pipelines import LAYER, X, open_pipeline

from pipeline import Result, pin, run_pipelined
from pipeline.devices.cuda import count_gpus
from pipeline.errors import DeviceNotFoundError, OptionError, PipelineError


def test_result_can_be_pickled_and_read_after_its_pipeline_is_closed() -> None:
    with open_pipeline() as pipeline:
        result = pipeline.run(X)
        copy = pickle.loads(pickle.dumps(result))
    assert_same_bits(copy.out, LAYER(X))
    assert copy.stats == result.stats and copy.stats.rows == len(X) and "stats" not in repr(result)


def test_run_pipelined_is_the_public_function() -> None:
    result = run_pipelined(LAYER, X, devices="cpu")
    assert isinstance(result, Result)
    assert_close(result.out, LAYER, X)


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

    def runs(seed: int) -> None:
        try:
            x = random_rows(150, 12, seed=seed)
            with open_pipeline(devices="cpu" if seed % 2 else "sim") as pipeline:
                for _ in range(3):
                    assert_same_bits(pipeline.run(x).out, LAYER(x))
                    assert_same_bits(pipeline.run(batches_of(x, [20])).out, LAYER(x))
        except BaseException as error:
            failures.append(error)

    with nothing_left_behind():
        threads = [threading.Thread(target=runs, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


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
