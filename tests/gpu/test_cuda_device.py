"""The GPU as a device: what every device must do, and what only a GPU has. Needs a GPU."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_close, assert_same_bits, batches_of, poisoned, random_layer, random_rows
from helpers.device_tests import DeviceTests
from helpers.gpu_runs import LAYER, MIB, X, device_free_bytes, open_pipeline, pinned, use_everything_once
from helpers.leaks import nothing_left_behind

from pipeline.devices.cuda import count_gpus

if not count_gpus():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

import torch

from pipeline import Pipeline, pin, run_pipelined
from pipeline.devices.cuda import is_pinned
from pipeline.devices.names import find_devices
from pipeline.errors import DeviceError, DeviceMemoryError, DriverError, DTypeError, InputError, OptionError


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    use_everything_once()


class TestCuda(DeviceTests):
    device_name = "cuda:0"


@pytest.fixture(scope="module")
def expected() -> Any:
    with open_pipeline() as pipeline:
        out = pipeline.run(X).out
    assert_close(out, LAYER, X)
    return out


# -- pinned memory of the caller's -------------------------------------------------------------------------------------


def test_pinned_tensors_are_used_in_place(expected: Any) -> None:
    """No fill and no drain: the copy engines read and write the caller's memory."""
    out = pinned(poisoned((3000, 192)))
    with open_pipeline() as pipeline:
        result = pipeline.run(pinned(X), out)
        assert result.out is out
        stages = result.stats.stages
        assert stages["fill"].count == stages["drain"].count == 0
        assert stages["H2D"].count == stages["D2H"].count == result.stats.chunks == 12
        assert result.stats.pinned_bytes == 0, "no ring was needed"
    assert_same_bits(out, expected)


def test_pinned_source_alone_spares_the_fill(expected: Any) -> None:
    with open_pipeline() as pipeline:
        result = pipeline.run(pinned(X), poisoned((3000, 192)))
    assert result.stats.stages["fill"].count == 0 < result.stats.stages["drain"].count
    assert_same_bits(result.out, expected)


def test_pinned_but_strided_goes_through_the_ring(expected: Any) -> None:
    wide = pinned(np.repeat(X, 2, axis=1))
    with open_pipeline() as pipeline:
        result = pipeline.run(wide[:, ::2])
    assert result.stats.stages["fill"].count > 0
    assert_same_bits(result.out, expected)


def test_pageable_memory_is_staged(expected: Any) -> None:
    with open_pipeline() as pipeline:
        result = pipeline.run(X)
        assert pipeline.fleet.stations[0].movers.rings["native"].load.allocated_bytes, "in C"
    assert result.stats.stages["fill"].bytes == X.nbytes
    assert_same_bits(result.out, expected)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "ieee"])
def test_staged_chunks_of_many_pieces_have_the_same_bits(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer(512, 320, precision=precision), random_rows(5000, 512)
    with open_pipeline(layer) as pipeline:
        want = pipeline.run(pinned(x)).out
    monkeypatch.setenv("PIPELINE_PIECE_BYTES", str(2**16))
    monkeypatch.setenv("PIPELINE_RING_PIECES", "3")
    out = np.full((5000, 320), np.nan, np.float32)
    with open_pipeline(layer) as pipeline:
        for _ in range(20):
            stats = pipeline.run(x, out).stats
            assert_same_bits(out, want)
            out.fill(np.nan)
    assert stats.stages["H2D"].count > 3 * stats.chunks and stats.stages["kernel"].count == stats.chunks


def test_rows_of_odd_width_are_staged_by_the_loop() -> None:
    layer, x = random_layer(33, 17), random_rows(3000, 33)
    with open_pipeline(layer) as pipeline:
        out = pipeline.run(x).out
        rings = pipeline.fleet.stations[0].movers.rings
        assert rings["Python"].load.allocated_bytes, "no single copy can move rows that are apart on the GPU"
        assert not rings["native"].load.allocated_bytes
    assert_close(out, layer, x)


def test_batches_are_gathered_into_pinned_memory_and_uploaded_from_there(expected: Any) -> None:
    with open_pipeline() as pipeline:
        result = pipeline.run(batches_of(X, [100, 700, 1, 333]))
        stages = result.stats.stages
        assert stages["H2D"].count == result.stats.chunks, "a chunk is one copy"
        assert stages["fill"].count == result.stats.chunks
    assert_same_bits(result.out, expected)


# -- CUDA tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_tensor_in_and_out_without_copies(dtype: str) -> None:
    layer = random_layer(256, 192, dtype)
    x = torch.randn(3000, 256, device="cuda:0").to(getattr(torch, dtype))
    out = torch.full((3000, 192), torch.nan, dtype=x.dtype, device="cuda:0")
    with open_pipeline(layer) as pipeline:
        result = pipeline.run(x, out)
        assert result.out is out
        stages = result.stats.stages
        assert all(stages[name].count == 0 for name in ("fill", "H2D", "D2H", "drain"))
        assert stages["kernel"].count == 12 and result.stats.source == "CUDA tensor"
        new = pipeline.run(x).out
        assert new.device == x.device and new.dtype == x.dtype
        assert_same_bits(new, out)
        assert_same_bits(pipeline.run(x.cpu()).out, out)
    assert_close(out, layer, x)


def test_cuda_tensor_with_a_row_stride_and_rows_around_it() -> None:
    wide = torch.randn(3000, 300, device="cuda:0")
    memory = torch.full((3002, 200), 7.0, device="cuda:0")
    out = memory[1:-1, 3:195]
    with open_pipeline() as pipeline:
        pipeline.run(wide[:, 4:260], out)
        assert_same_bits(out.contiguous(), pipeline.run(wide[:, 4:260].contiguous()).out)
    out.fill_(7.0)
    assert (memory == 7.0).all(), "the kernel wrote outside its output"


def test_cuda_tensor_at_one_end_only(expected: Any, tmp_path: Path) -> None:
    """Rows cross the bus once: the kernel reads or writes the tensor where it is."""
    x, out = torch.from_numpy(X).cuda(), torch.full((3000, 192), torch.nan, device="cuda:0")
    with open_pipeline() as pipeline:
        result = pipeline.run(X, out)
        assert result.out is out and result.stats.stages["D2H"].count == result.stats.stages["drain"].count == 0
        assert_same_bits(out, expected)
        for host in (poisoned((3000, 192)), pinned(poisoned((3000, 192)))):
            stats = pipeline.run(x, host).stats
            assert stats.stages["fill"].count == stats.stages["H2D"].count == 0 < stats.stages["D2H"].count
            assert_same_bits(host, expected)
        assert_same_bits(np.load(pipeline.run(x, tmp_path / "y.npy").out), expected)
    with open_pipeline(wire_dtype="bf16") as pipeline:
        narrow = torch.full((3000, 192), torch.nan, device="cuda:0", dtype=torch.bfloat16)
        with open_pipeline(wire_dtype="bf16", out_dtype="bf16") as rounded:
            rounded.run(X, narrow)
        assert_same_bits(narrow.float(), pipeline.run(X).out)


def test_cuda_out_is_written_after_the_callers_stream_has_used_it() -> None:
    stream = torch.cuda.Stream()
    with open_pipeline() as pipeline:
        right = pipeline.run(torch.from_numpy(X).cuda()).out
        out = torch.empty_like(right)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # some 30 ms
            out.fill_(torch.nan)
            pipeline.run(X, out)
        stream.synchronize()
    assert_same_bits(out, right)


# -- pin ---------------------------------------------------------------------------------------------------------------


def test_pin_spares_the_staging_until_it_is_closed(expected: Any) -> None:
    x, y = X.copy(), poisoned((3000, 192))
    with open_pipeline() as pipeline:
        with pin(x) as source, pin(torch.from_numpy(y)) as out:
            assert source is x
            stages = pipeline.run(source, out).stats.stages
            assert stages["fill"].count == stages["drain"].count == 0
        assert_same_bits(y, expected)
        y[...] = np.nan
        stages = pipeline.run(x, y).stats.stages
        assert stages["fill"].count > 0 < stages["drain"].count
        assert_same_bits(y, expected)


def test_pin_of_any_size_and_twice_and_forgotten() -> None:
    assert not is_pinned(X.ctypes.data)
    for n_bytes in (1, 4096, 600 * MIB):
        memory = np.ones(n_bytes // 4 + 1, np.float32)
        with pin(memory):
            assert is_pinned(memory.ctypes.data) and is_pinned(memory.ctypes.data + memory.nbytes - 1)
            with pin(memory) as again:
                assert again is memory
            assert is_pinned(memory.ctypes.data), "the inner handle has nothing to unregister"
        assert not is_pinned(memory.ctypes.data)
    handle = pin(memory)
    assert is_pinned(memory.ctypes.data)
    del handle
    gc.collect()
    assert not is_pinned(memory.ctypes.data), "a forgotten handle unregisters"
    handle = pin(memory)
    handle.close()
    handle.close()
    with pin(np.empty((0, 5), np.float32)):
        pass


def test_pin_of_read_only_memory_and_of_maps(expected: Any, tmp_path: Path) -> None:
    frozen = X.copy()
    frozen.setflags(write=False)
    np.save(tmp_path / "x.npy", X)
    with open_pipeline() as pipeline:
        with pin(frozen) as source:
            assert_same_bits(pipeline.run(source).out, expected)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        with pin(mapped) as source:
            assert_same_bits(pipeline.run(source).out, expected)
    writable = np.load(tmp_path / "x.npy", mmap_mode="r+")
    with pytest.raises(DriverError, match=r"pinning .* host memory failed") as caught:
        pin(writable)
    assert any("writable maps" in note for note in caught.value.__notes__)


def test_cuda_tensor_of_no_rows() -> None:
    with open_pipeline() as pipeline:
        result = pipeline.run(torch.empty(0, 256, device="cuda:0"))
    assert tuple(result.out.shape) == (0, 192) and result.out.is_cuda


def test_cuda_tensor_is_read_after_the_callers_stream_has_written_it() -> None:
    """The caller's stream is held up, then writes x; the run is called at once."""
    stream = torch.cuda.Stream()
    truth = torch.randn(3000, 256, device="cuda:0")
    x = torch.full_like(truth, torch.nan)
    with open_pipeline() as pipeline:
        right = pipeline.run(truth).out
        torch.cuda.synchronize()
        for _ in range(5):
            x.fill_(torch.nan)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)  # some 30 ms
                x.copy_(truth)
                out = pipeline.run(x).out
            assert_same_bits(out, right)


def test_cuda_run_does_not_wait_for_other_streams_of_the_caller() -> None:
    """No device-wide synchronisation: another stream's work is still going on when the run is over."""
    busy = torch.cuda.Stream()
    with open_pipeline() as pipeline:
        pipeline.run(X)
        with torch.cuda.stream(busy):
            torch.cuda._sleep(4_000_000_000)  # some 2 s
            event = torch.cuda.Event()
            event.record()
        pipeline.run(X)
        assert not event.query(), "the run waited for a stream that it has nothing to do with"
        event.synchronize()


def test_cuda_tensor_bad_input_is_refused_by_name(tmp_path: Path) -> None:
    x = torch.randn(300, 256, device="cuda:0")
    out = torch.zeros(300, 192, device="cuda:0")
    bad: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (x.T.contiguous().T, None, {}, InputError, r"strides .*contiguous"),
        (x.double(), None, {}, DTypeError, "float64"),
        (x[:, :100], None, {}, InputError, "100 features"),
        (X[:300], out.double(), {}, DTypeError, "float64"),
        (X[:300], out.bfloat16(), {}, DTypeError, "bfloat16"),
        (X[:300], torch.zeros(192, 300, device="cuda:0").T, {}, OptionError, "contiguous rows"),
        (X[:300], out, {"devices": "cpu"}, OptionError, "out is on cuda:0, this run uses cpu"),
        (x, None, {"wire_dtype": "bf16"}, OptionError, "wire_dtype is for rows that cross the bus"),
        (x, out[:299], {}, InputError, r"\(299, 192\)"),
        (x, out.bfloat16(), {}, DTypeError, "bfloat16"),
        ([x], None, {}, InputError, "CUDA tensor"),
        (x, None, {"devices": "cpu"}, OptionError, "cuda:0"),
    ]
    with nothing_left_behind(tmp_path):
        for source, target, options, error, text in bad:
            with pytest.raises(error, match=text):
                run_pipelined(LAYER, source, target, **{"devices": "cuda:0", **options})
    shared = torch.zeros(300, 256, device="cuda:0")
    square = random_layer(256, 256)
    with pytest.raises(OptionError, match="overlaps"):
        run_pipelined(square, shared[:200], shared[100:], devices="cuda:0")


def test_float64_is_refused_on_a_gpu() -> None:
    with pytest.raises(DTypeError, match="float64 is computed on the CPU only"):
        run_pipelined(random_layer(4, 4, "float64"), random_rows(3, 4, "float64"), devices="cuda:0")
    with pytest.raises(DTypeError, match="float64 is computed on the CPU only"):
        open_pipeline(out_dtype="float64")


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows,num_streams", [(1, 4), (33, 1), (128, 2), (1000, 5), (5000, 3)])
def test_run_same_bits_for_any_chunks_and_streams(chunk_rows: int, num_streams: int, expected: Any) -> None:
    rows = 200 if chunk_rows == 1 else 3000
    with open_pipeline(chunk_rows=chunk_rows, num_streams=num_streams) as pipeline:
        assert_same_bits(pipeline.run(X[:rows]).out, expected[:rows])
        assert_same_bits(pipeline.run(pinned(X[:rows])).out, expected[:rows])


def test_run_has_the_bits_of_the_layer_called_on_the_gpu(expected: Any) -> None:
    assert_same_bits(LAYER(torch.from_numpy(X).cuda()), expected)


def test_run_poisoned_in_debug_mode_has_the_same_bits(expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEBUG", "1")
    monkeypatch.setenv("PIPELINE_PIECE_BYTES", "50000")
    with open_pipeline() as pipeline:
        for _ in range(5):
            assert_same_bits(pipeline.run(X, poisoned((3000, 192))).out, expected)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_chunk_that_cannot_fit_is_refused_by_name() -> None:
    free = device_free_bytes()
    rows = free // (256 * 4 + 192 * 4)
    with nothing_left_behind():
        with pytest.raises(DeviceMemoryError, match=r"GiB on cuda:0, .* GiB are free.*chunk_rows=\d+ or less"):
            open_pipeline(chunk_rows=rows, num_streams=3)
    assert device_free_bytes() > free - 64 * MIB
    with open_pipeline() as pipeline:
        assert_close(pipeline.run(X).out, LAYER, X)


def test_allocation_that_fails_names_what_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's own refusal, where the check before let it pass."""
    monkeypatch.setattr("pipeline.station._check_memory", lambda *arguments: None)
    free = device_free_bytes()
    with nothing_left_behind():
        with pytest.raises(DeviceMemoryError, match=r"chunk \d needs .* GiB on cuda:0"):
            open_pipeline(chunk_rows=free // 1500, num_streams=3)
    assert device_free_bytes() > free - 64 * MIB, "what was allocated before the refusal is free again"


def test_device_that_is_not_there_is_refused_by_name() -> None:
    count = count_gpus()
    with pytest.raises(DeviceError, match=f"'cuda:{count}' isn't there; there are {count}"):
        run_pipelined(LAYER, X, devices=f"cuda:{count}")


def test_all_gpus_are_the_default() -> None:
    assert find_devices(None) == [f"cuda:{ordinal}" for ordinal in range(count_gpus())]


def _use_in_child(pipeline: Pipeline, answers: Any) -> None:
    try:
        pipeline.run(X[:10])
        answers.put(("no error", ""))
    except BaseException as error:
        answers.put((type(error).__name__, str(error)))


def _open_in_child(answers: Any) -> None:
    try:
        open_pipeline()
        answers.put(("no error", ""))
    except DeviceError as error:
        answers.put(("DeviceError", str(error)))
    except BaseException as error:
        answers.put((type(error).__name__, str(error)))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_fork_after_cuda_has_started_is_a_clear_error() -> None:
    fork = multiprocessing.get_context("fork")
    with open_pipeline() as pipeline:
        pipeline.run(X)
        answers = fork.SimpleQueue()
        child = fork.Process(target=_use_in_child, args=(pipeline, answers))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        kind, text = answers.get()
        assert kind == "PipelineError" and "forked" in text and "spawn" in text
        child = fork.Process(target=_open_in_child, args=(answers,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert answers.get()[0] == "DeviceError"
        assert_close(pipeline.run(X).out, LAYER, X)


def test_second_process_works_beside_the_first(tmp_path: Path) -> None:
    for name, array in (("x", X), ("weight", LAYER.weight), ("bias", LAYER.bias)):
        np.save(tmp_path / f"{name}.npy", array)
    code = """
        import numpy as np
        from pipeline import FusedLinear, run_pipelined
        layer = FusedLinear(np.load("weight.npy"), np.load("bias.npy"), 2.0)
        run_pipelined(layer, "x.npy", "y.npy", devices="cuda:0")
    """
    with open_pipeline() as pipeline:
        expected = pipeline.run(X).out
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True, timeout=120)
    assert_same_bits(np.load(tmp_path / "y.npy"), expected)
