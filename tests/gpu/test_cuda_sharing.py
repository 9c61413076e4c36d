"""What runs on a GPU leave behind and share: memory, threads, several devices. Needs a GPU."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers.data import assert_close, assert_same_bits, batches_of, random_layer, random_rows
from helpers.gpu_runs import LAYER, MIB, X, device_free_bytes, kinds, open_pipeline, pinned, use_everything_once
from helpers.leaks import nothing_left_behind

from pipeline.devices.cuda import count_gpus
from pipeline.report.trace import read_trace

if not count_gpus():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

import torch

from pipeline import Pipeline, pin, run_pipelined
from pipeline.devices.names import open_device
from pipeline.errors import OptionError


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    use_everything_once()


@pytest.fixture(scope="module")
def expected() -> Any:
    with open_pipeline() as pipeline:
        out = pipeline.run(X).out
    assert_close(out, LAYER, X)
    return out


def locked_kib() -> int:
    """Pinned host memory of the process as the kernel counts it; 0 where the driver pins without telling."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("VmPin:", "VmLck:")) and line.split()[1] != "0":
            return int(line.split()[1])
    return 0


@pytest.mark.parametrize("reopen", [False, True])
def test_memory_stays_flat_over_20_runs(reopen: bool) -> None:
    x = random_rows(20_000, 256)
    process = psutil.Process()

    def runs(pipeline: Pipeline) -> None:
        for source in kinds(x):
            pipeline.run(source)

    def rest() -> tuple[int, int, int]:
        gc.collect()
        return device_free_bytes(), process.memory_info().rss, locked_kib()

    pipeline = open_pipeline()
    for _ in range(5):
        runs(pipeline)
    free, resident, locked = rest()
    for _ in range(20):
        if reopen:
            pipeline.close()
            pipeline = open_pipeline()
        runs(pipeline)
    free_after, resident_after, locked_after = rest()
    pipeline.close()
    assert free_after > free - 8 * MIB, f"{(free - free_after) / MIB:.1f} MiB of device memory are gone"
    assert resident_after < resident + 2 * x.nbytes, f"{(resident_after - resident) / MIB:.1f} MiB more are resident"
    assert locked_after <= locked + 1024


def test_close_gives_device_memory_back() -> None:
    torch.zeros(1, device="cuda:0")
    with open_pipeline() as pipeline:  # loads the module
        pipeline.run(X)
    free = device_free_bytes()
    with nothing_left_behind():
        pipeline = open_pipeline(chunk_rows=100_000)
        pipeline.run(X)
        assert device_free_bytes() < free - 3 * 100_000 * (256 + 192) * 4 + 64 * MIB
        pipeline.close()
        pipeline.close()
    assert device_free_bytes() > free - 8 * MIB


def test_two_jobs_at_once_in_two_threads() -> None:
    layers = [random_layer(256, 192, seed=seed) for seed in range(2)]
    xs = [random_rows(20_000, 256, seed=seed) for seed in range(2)]
    results: dict[int, list[Any]] = {0: [], 1: []}
    errors: list[BaseException] = []

    def stream(number: int) -> None:
        try:
            with open_pipeline(layers[number]) as pipeline:
                for source in kinds(xs[number]):
                    results[number].append(pipeline.run(source).out)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(2):
        assert_close(results[number][0], layers[number], xs[number])
        for out in results[number][1:]:
            assert_same_bits(out, results[number][0])


def test_run_in_a_background_thread(expected: Any) -> None:
    outs: list[Any] = []
    with open_pipeline() as pipeline:
        for source in kinds(X):
            thread = threading.Thread(target=lambda source=source: outs.append(pipeline.run(source).out))
            thread.start()
            thread.join()
    assert len(outs) == 4
    for out in outs:
        assert_same_bits(out, expected)


def test_copies_and_kernels_overlap() -> None:
    """The event record of a run with several chunks in flight: no stage waits for all others."""
    layer, x = random_layer(2048, 2048), pinned(random_rows(32_768, 2048))
    out = pinned(np.zeros((32_768, 2048), np.float32))
    with Pipeline(layer, devices="cuda:0", chunk_rows=2048) as pipeline:
        pipeline.run(x, out)
        stats = pipeline.run(x, out).stats
    assert sum(stats.stages[name].busy_share for name in ("H2D", "kernel", "D2H")) > 1.2, str(stats)
    assert stats.kernel_hidden_share is not None and stats.kernel_hidden_share > 0.9, str(stats)


def test_event_times_lie_within_the_run() -> None:
    with open_pipeline() as pipeline:
        stats = pipeline.run(X).stats
    for stage in stats.stages.values():
        assert 0 < stage.busy_s <= stats.run_s, str(stats)


def test_streams_many_small_batches() -> None:
    with nothing_left_behind(), open_pipeline() as pipeline:
        expected = pipeline.run(X).out
        at = 0
        for result in pipeline.stream(X[a : a + 37] for a in range(0, 3000, 37)):
            assert_same_bits(result, expected[at : at + len(result)])
            at += len(result)
        assert at == 3000
        results = pipeline.stream(X for _ in range(10**9))
        next(results)
        results.close()
        assert_same_bits(pipeline.run(X).out, expected)


@pytest.mark.skipif(count_gpus() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["array", "pinned", "batches", "path", "stream"])
def test_two_gpus_share_a_job(kind: str, tmp_path: Path) -> None:
    x = random_rows(200_000, 256)  # the second GPU's thread starts when the first is at work
    np.save(tmp_path / "x.npy", x)
    with open_pipeline() as one:
        expected = one.run(x).out
    with open_pipeline(devices="cuda:1") as other:  # CUDA keeps some descriptors for each GPU that was used once
        other.run(x[:1000])
    source = {
        "array": lambda: x,
        "pinned": lambda: pinned(x),
        "batches": lambda: batches_of(x, [1111]),
        "path": lambda: tmp_path / "x.npy",
        "stream": lambda: batches_of(x, [1111]),
    }[kind]()
    with nothing_left_behind(tmp_path), open_pipeline(devices=["cuda:0", "cuda:1"]) as both:
        both.run(x[:50_000])  # allocates the rings, which may take one GPU longer than the other all the work
        if kind == "stream":
            assert_same_bits(np.concatenate(list(both.stream(source))), expected)
            return
        result = both.run(source, tmp_path / "y.npy" if kind == "path" else None, trace=tmp_path / "run.json")
        assert list(result.stats.devices) == ["cuda:0", "cuda:1"]
        assert_same_bits(np.load(result.out) if kind == "path" else result.out, expected)
        timeline, _ = read_trace(tmp_path / "run.json")
        assert all(timeline.devices.values()), "one GPU did all the work"


@pytest.mark.skipif(count_gpus() < 2, reason="needs two GPUs")
def test_pipeline_leaves_the_current_device_alone() -> None:
    with torch.cuda.device(1):
        with open_pipeline(devices="cuda:0") as pipeline:
            assert torch.cuda.current_device() == 1
            pipeline.run(X)
            assert torch.cuda.current_device() == 1
            with pin(X.copy()):
                assert torch.cuda.current_device() == 1
        assert torch.cuda.current_device() == 1


@pytest.mark.skipif(count_gpus() < 2, reason="needs two GPUs")
def test_cuda_tensor_is_computed_where_it_is() -> None:
    x = torch.randn(3000, 256, device="cuda:1")
    with open_pipeline(devices=["cuda:0", "cuda:1"]) as pipeline:
        result = pipeline.run(x)
    assert result.out.device == x.device and list(result.stats.devices) == ["cuda:1"]
    assert_close(result.out, LAYER, x)
    with pytest.raises(OptionError, match="cuda:1"):
        run_pipelined(LAYER, x, devices="cuda:0")


def test_device_opens_in_any_thread() -> None:
    failures: list[BaseException] = []

    def use() -> None:
        try:
            device = open_device("cuda:0")
            assert (device.free_bytes() or 0) > 0
            device.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_visible_devices_are_what_is_counted() -> None:
    assert count_gpus() == torch.cuda.device_count()
