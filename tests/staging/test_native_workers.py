"""The copy workers: the native library against NumPy and torch, its errors, its absence, and casts on the wire."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import assert_same_bits, batches_of, poisoned, random_layer, random_rows
from helpers.leaks import small_rings, wait_until

from pipeline import FileFormatError, FusedLinear, OptionError, OutputError, Pipeline, PipelineError, run_pipelined
from pipeline.arrays import HostArray, host_tensor
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Cast, DType
from pipeline.io.files import FileLayout, FileRows
from pipeline.io.memory import ArrayRows
from pipeline.rows import Drain, Fill
from pipeline.staging.native import INSTRUCTIONS, NativeWorkers, open_workers
from pipeline.staging.threads import ThreadWorkers

ROOT = Path(__file__).resolve().parents[2]
CASTS = [Cast(FLOAT32, BFLOAT16), Cast(FLOAT32, FLOAT16), Cast(BFLOAT16, FLOAT32), Cast(FLOAT16, FLOAT32)]


@pytest.fixture(params=[*INSTRUCTIONS, "NumPy"])
def workers(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Native workers of every kind, and the Python threads that stand in for them."""
    kind: str = request.param
    made: Any = ThreadWorkers(3) if kind == "NumPy" else NativeWorkers(3, kind)
    assert kind in ("best", "NumPy") or kind in made.description or "portable" in made.description
    yield made
    made.close()


def fill(piece: HostArray, source: HostArray, cast: Cast | None = None) -> Fill:
    return Fill(ArrayRows(source, cast), 0, piece)


def drain(target: HostArray, piece: HostArray, cast: Cast | None = None, *, fresh: bool = False) -> Drain:
    return Drain(ArrayRows(target, cast, fresh=fresh), 0, piece)


def file_rows(fd: int, position: int, path: Path, piece: HostArray, cast: Cast | None, *, reads: bool) -> FileRows:
    itemsize = piece.itemsize if cast is None else (cast.source if reads else cast.target).itemsize
    return FileRows(FileLayout.in_order(fd, path, position, piece.shape[1], itemsize, reads=reads), 0, cast)


def read_job(piece: HostArray, fd: int, position: int, path: Path, cast: Cast | None = None) -> Fill:
    return Fill(file_rows(fd, position, path, piece, cast, reads=True), 0, piece)


def write_job(piece: HostArray, fd: int, position: int, path: Path, cast: Cast | None = None) -> Drain:
    return Drain(file_rows(fd, position, path, piece, cast, reads=False), 0, piece)


def finish(operation: Any) -> None:
    assert wait_until(operation.done)


# -- copies and casts --------------------------------------------------------------------------------------------------


def edge_values(dtype: DType) -> HostArray:
    """Every bit pattern of a 16-bit type; for float32 those around every 16-bit value's roundings, and random bits."""
    if dtype.itemsize == 2:
        return np.arange(2**16, dtype=np.uint16).view(dtype.carrier)
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    noise = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    return np.concatenate([(upper[:, None] | lower).ravel(), noise]).view(np.float32)


def by_torch(values: HostArray, cast: Cast) -> HostArray:
    tensor = host_tensor(values.copy(), cast.source).to(getattr(torch, cast.target.name))
    return tensor.view(torch.uint16 if cast.target is BFLOAT16 else tensor.dtype).numpy()


def assert_same_numbers(got: HostArray, expected: HostArray, dtype: DType) -> None:
    """The same bits, but for the payloads of NaN."""
    bits = np.dtype(f"u{dtype.itemsize}")
    nan = np.isnan(host_tensor(got.copy(), dtype).float().numpy())
    expected_nan = np.isnan(host_tensor(expected.copy(), dtype).float().numpy())
    assert (nan == expected_nan).all(), "NaN must stay NaN and nothing else become it"
    assert (got.view(bits)[~nan] == expected.view(bits)[~nan]).all()


@pytest.mark.parametrize("cast", CASTS, ids=lambda cast: f"{cast.source}-{cast.target}")
def test_cast_of_every_kind_of_number_is_torchs(cast: Cast, workers: Any) -> None:
    source = edge_values(cast.source)
    target = np.full(source.shape, 7, cast.target.carrier)
    finish(workers.submit(fill(target[None], source[None], cast)))
    assert_same_numbers(target, by_torch(source, cast), cast.target)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cast", [None, *CASTS], ids=lambda cast: f"{cast.source}-{cast.target}" if cast else "copy")
def test_copy_of_rows_of_any_strides_touches_nothing_else(cast: Cast | None, streaming: bool, workers: Any) -> None:
    source_dtype, target_dtype = cast or (FLOAT32, FLOAT32)
    choose = np.random.default_rng(1)
    jobs = []
    for rows, features in itertools.product((0, 1, 3, 50), (1, 7, 64, 1000, 70_001)):
        if rows * features > 300_000:
            continue
        wide = random_rows(rows + 2, features + 5, seed=rows).astype(np.float32)
        if source_dtype.itemsize == 2:
            wide = (wide.view(np.uint32) >> 16).astype(np.uint16).view(source_dtype.carrier)
        memory = np.full((2 * rows + 2, features + 9), 7, target_dtype.carrier)
        shift = int(choose.integers(0, 4))
        source, target = wide[1:-1, shift : shift + features], memory[1:-1:2, 1 + shift : 1 + shift + features]
        if rows % 2:
            source = source[::-1]
        jobs.append(
            (
                workers.submit(drain(target, source, cast) if streaming else fill(target, source, cast)),
                target,
                source,
                memory,
            )
        )
    for job, target, source, memory in jobs:
        finish(job)
        start, end = job.times()
        assert start <= end
        expected = by_torch(np.ascontiguousarray(source), cast) if cast else source
        assert_same_numbers(np.ascontiguousarray(target), np.ascontiguousarray(expected), target_dtype)
        target[...] = 7
        assert (memory == 7).all(), "the copy wrote outside its target"


def test_what_the_native_pool_cannot_do_numpy_does() -> None:
    x = random_rows(60, 40)
    sources = [np.asfortranarray(x), x.astype(">f4"), np.repeat(x, 2, axis=1)[:, ::2]]
    workers = NativeWorkers(2)
    try:
        for source in sources:
            target = poisoned(x.shape)
            workers.run(fill(target, source))
            assert_same_bits(target, x)
            target = poisoned(x.shape)
            finish(workers.submit(fill(target, source)))
            assert_same_bits(target, x)
        assert "3 copies by NumPy" in workers.description
    finally:
        workers.close()


def test_many_jobs_from_many_threads_each_end_once() -> None:
    workers = NativeWorkers(4)
    source = random_rows(400, 1000)
    targets = [poisoned(source.shape) for _ in range(4)]

    def submit(target: HostArray) -> None:
        jobs = [
            workers.submit((drain if i % 8 else fill)(target[i : i + 4], source[i : i + 4])) for i in range(0, 400, 4)
        ]
        for job in jobs:
            finish(job)

    threads = [threading.Thread(target=submit, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for target in targets:
        assert_same_bits(target, source)
    assert not workers._jobs, "a job that is done is forgotten"
    workers.close()


@pytest.mark.parametrize("drained", ["to memory", "to fresh memory", "to a file"])
def test_drain_does_not_wait_for_the_fills_queued_before_it(drained: str, tmp_path: Path) -> None:
    """One worker takes a grain of each in turn; with one queue for both the fills would be over first."""
    source, piece = random_rows(4000, 4000), poisoned((4000, 4000))
    rows, result = random_rows(50, 4000, seed=1), poisoned((50, 4000))
    with contextlib.closing(NativeWorkers(1)) as workers, open(tmp_path / "result", "wb") as file:
        if drained == "to a file":
            work: Any = write_job(rows, file.fileno(), 0, tmp_path / "result")
        else:
            work = drain(result, rows, fresh=drained == "to fresh memory")
        fills = [workers.submit(fill(piece, source)) for _ in range(20)]
        job = workers.submit(work)
        for each in (job, *fills):
            finish(each)
        assert job.times()[1] < fills[-1].times()[1]
    if drained == "to a file":
        result = np.fromfile(tmp_path / "result", np.float32).reshape(result.shape)
    assert_same_bits(piece, source)
    assert_same_bits(result, rows)


def test_interrupt_between_any_two_steps_of_a_job_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was seen to be done once, and forgotten half way, can be looked at again."""
    workers = NativeWorkers(2)
    source, target = random_rows(100, 100), poisoned((100, 100))
    job = workers.submit(fill(target, source))
    workers.wait_all()
    with monkeypatch.context() as patch:
        patch.setattr(NativeWorkers, "forget", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.done()
    assert job.done() and job.done()
    assert_same_bits(target, source)
    workers.close()


def test_closed_workers_take_no_work() -> None:
    """The pool's memory is gone."""
    workers = NativeWorkers(1)
    workers.close()
    job = fill(poisoned((2, 2)), random_rows(2, 2))
    for use in (workers.submit, workers.run):
        with pytest.raises(PipelineError, match="closed"):
            use(job)


def test_jobs_that_nobody_asks_for_are_forgotten_once_all_are_done() -> None:
    """As of a run that was interrupted: the workers must not keep its arrays."""
    workers = NativeWorkers(2)
    source, target = random_rows(100, 100), poisoned((100, 100))
    workers.submit(fill(target, source))
    workers.wait_all()
    assert not workers._jobs
    assert_same_bits(target, source)
    workers.close()


def test_interrupts_at_any_moment_leave_a_pipeline_ready() -> None:
    """SIGINT again and again while rows are cast through the ring by native workers; then a run that must be right.

    Without the garbage collector: Hypothesis has a callback there, and Python drops an interrupt that arrives in one.
    """
    layer, x = random_layer(64, 64), random_rows(20_000, 64)
    expected = wire_result(layer, x, "bf16").float().numpy()
    choose, interrupted = np.random.default_rng(5), 0
    with Pipeline(layer, devices="cpu", chunk_rows=200, wire_dtype="bf16") as pipeline:
        pipeline.run(x)
        gc.disable()
        try:
            for _ in range(40):
                timer = threading.Timer(float(choose.uniform(0, 0.02)), signal.raise_signal, [signal.SIGINT])
                try:
                    timer.start()
                    for _ in range(1000):
                        pipeline.run(x)
                except KeyboardInterrupt:
                    interrupted += 1
                timer.join()
        finally:
            gc.enable()
        out = poisoned(expected.shape)
        assert_same_bits(pipeline.run(x, out).out, expected)
    assert interrupted == 40


def test_close_lets_queued_jobs_end() -> None:
    workers = NativeWorkers(1)
    source, target = random_rows(2000, 2000), poisoned((2000, 2000))
    job = workers.submit(fill(target, source))
    workers.close()
    assert_same_bits(target, source)
    assert job.done()


# -- files and pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [None, *CASTS], ids=lambda cast: f"{cast.source}-{cast.target}" if cast else "plain")
def test_file_jobs_cast_on_the_way(cast: Cast | None, workers: Any, tmp_path: Path) -> None:
    source_dtype, target_dtype = cast or (FLOAT32, FLOAT32)
    values = random_rows(700, 1001).astype(np.float32)
    if source_dtype.itemsize == 2:
        values = (values.view(np.uint32) >> 16).astype(np.uint16).view(source_dtype.carrier)
    expected = by_torch(values, cast) if cast else values
    path = tmp_path / "rows"
    path.write_bytes(b"header!" + values.tobytes())
    fd = os.open(path, os.O_RDWR)
    try:
        target = np.full(values.shape, 7, target_dtype.carrier)
        finish(workers.submit(read_job(target, fd, 7, path, cast)))
        assert_same_numbers(target, expected, target_dtype)
        finish(workers.submit(write_job(values, fd, 3, path, cast)))
        written = path.read_bytes()
        assert written[:3] == b"hea" and written[3 : 3 + expected.nbytes] == target.tobytes()
    finally:
        os.close(fd)


def test_file_jobs_name_what_failed(workers: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(5000))
    rows = np.zeros((10, 200), np.float32)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(FileFormatError, match=r"rows ended at byte 5000, 3007 bytes early"):
            finish(workers.submit(read_job(rows, fd, 7, path)))
        with pytest.raises(OutputError, match=r"rows failed: Bad file descriptor; free space"):
            finish(workers.submit(write_job(rows, fd, 0, path)))
        with pytest.raises(OutputError):
            workers.run(write_job(rows, fd, 0, path))
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        finish(workers.submit(read_job(rows, -1, 0, path)))
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("cast", [None, Cast(BFLOAT16, FLOAT32)])
def test_copy_to_fresh_memory_of_several_huge_pages(cast: Cast | None, workers: Any) -> None:
    """Whatever the memory's place among huge pages; nothing around it is written."""
    dtype = np.float32 if cast is None else np.uint16
    source = np.arange(3 * 524_288 + 1000, dtype=np.uint32).astype(np.uint16).astype(dtype).reshape(1, -1)
    expected = source[0] if cast is None else (source[0].astype(np.uint32) << 16).view(np.float32)
    whole = np.empty(source.size + 700_000, np.float32)
    for first in (0, 1, 524_287, 600_001):
        whole[:] = -1
        part = whole[first : first + source.size].reshape(1, -1)
        finish(workers.submit(drain(part, source, cast, fresh=True)))
        assert np.array_equal(part[0].view(np.uint32), expected.view(np.uint32))
        assert (whole[:first] == -1).all() and (whole[first + source.size :] == -1).all()


# -- which workers -----------------------------------------------------------------------------------------------------


def test_workers_are_native_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_workers(2)
    assert "native" in made.description and "NumPy" not in made.description
    made.close()
    monkeypatch.setenv("PIPELINE_NATIVE_COPY", "0")
    made = open_workers(2)
    assert made.description == "copy workers: 2 (NumPy; native ones switched off)"
    made.close()


def test_rows_with_gaps_are_refused_for_files(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(4 * 5 * 4))
    with open(path, "rb") as file, contextlib.closing(NativeWorkers(1)) as workers:
        job = read_job(np.empty((4, 9), np.float32)[:, :5], file.fileno(), 0, path)
        with pytest.raises(PipelineError, match="refused: Invalid argument"):
            workers.submit(job)
        whole = np.ones((4, 5), np.float32)
        workers.run(read_job(whole, file.fileno(), 0, path))
        assert not whole.any(), "and go on"


def test_workers_that_cannot_start_say_so() -> None:
    with pytest.raises(OSError, match="can't start 0 copy workers: Invalid argument"):
        NativeWorkers(0)


# -- casts on the wire -------------------------------------------------------------------------------------------------


def wire_result(layer: FusedLinear, x: HostArray, wire: str) -> torch.Tensor:
    """The layer computed in the wire's type: weights, rows and results are rounded to it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[wire]
    weight, bias = (torch.from_numpy(a).to(dtype) for a in (layer.weight, layer.bias))
    narrow: torch.Tensor = FusedLinear(weight, bias, layer.scaling_factor)(torch.from_numpy(x).to(dtype))
    return narrow


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_wire_dtype_halves_the_bytes_and_keeps_the_results_type(
    device: str, wire: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rings(monkeypatch, 2000)
    layer, x = random_layer(37, 29), random_rows(333, 37)
    expected = wire_result(layer, x, wire).float().numpy()
    np.save(tmp_path / "x.npy", x)
    with Pipeline(layer, devices=device, chunk_rows=40, wire_dtype=wire) as pipeline:
        result = pipeline.run(x)
        assert result.out.dtype == np.float32
        assert result.stats.stages["H2D"].bytes == x.nbytes // 2
        assert result.stats.stages["D2H"].bytes == expected.nbytes // 2
        assert result.stats.bytes_in == x.nbytes and result.stats.bytes_out == expected.nbytes
        assert result.stats.wire == result.stats.precision == {"bf16": "bfloat16", "fp16": "float16"}[wire]
        assert_same_bits(result.out, expected)
        out = np.asfortranarray(poisoned(expected.shape))
        assert_same_bits(pipeline.run(np.asfortranarray(x), out).out, expected)
        assert_same_bits(pipeline.run(torch.from_numpy(x)).out, torch.from_numpy(expected))
        assert_same_bits(pipeline.run(batches_of(x, [50, 7, 91])).out, expected)
        assert_same_bits(np.concatenate(list(pipeline.stream([x[:100], x[100:]]))), expected)
        assert_same_bits(np.load(pipeline.run(tmp_path / "x.npy", tmp_path / "y.npy").out), expected)


def test_wire_dtype_with_an_out_dtype_of_its_size_needs_no_cast_back() -> None:
    layer, x = random_layer(37, 29), random_rows(333, 37)
    narrow = wire_result(layer, x, "bf16")
    with Pipeline(layer, devices="cpu", wire_dtype="bf16", out_dtype="bf16") as pipeline:
        result = pipeline.run(torch.from_numpy(x))
        assert result.out.dtype == torch.bfloat16 and result.stats.stages["drain"].count == 0
        assert_same_bits(result.out, narrow)
    out = run_pipelined(layer, x, devices="cpu", wire_dtype="bf16", out_dtype="fp16").out
    assert out.dtype == np.float16
    assert np.allclose(out, narrow.float().numpy(), rtol=2**-7, atol=2**-7)


def test_wire_dtype_of_the_layer_itself_changes_nothing() -> None:
    layer, x = random_layer(37, 29, "float16"), random_rows(50, 37, "float16")
    assert_same_bits(run_pipelined(layer, x, devices="cpu", wire_dtype="fp16").out, layer(x))


@pytest.mark.parametrize(
    ("dtype", "options", "text"),
    [
        ("float16", {"wire_dtype": "bf16"}, "wire_dtype is bfloat16 for a layer of float16"),
        ("float64", {"wire_dtype": "fp16"}, "wire_dtype is float16 for a layer of float64"),
        ("float32", {"wire_dtype": "float64"}, "wire_dtype is float64 for a layer of float32"),
        ("float32", {"wire_dtype": "int8"}, "wire_dtype is 'int8', expected 'bf16' or 'fp16'"),
        ("float32", {"wire_dtype": 3}, "wire_dtype is 3, expected 'bf16' or 'fp16'"),
        ("float32", {"wire_dtype": "bf16", "out_dtype": "float64"}, "out_dtype float64"),
    ],
)
def test_wire_dtype_that_makes_no_sense_is_refused(dtype: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises((OptionError, PipelineError), match=text):
        Pipeline(random_layer(4, 4, dtype), devices="cpu", **options)


def test_native_copy_variable_takes_no_other_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_NATIVE_COPY", "no")
    with pytest.raises(OptionError, match="PIPELINE_NATIVE_COPY is 'no', expected 0"):
        Pipeline(random_layer(4, 4), devices="cpu")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_wire_dtype_with_a_precision_says_which_to_leave_out(precision: str) -> None:
    weight = np.ones((4, 4), np.float32)
    with pytest.raises(OptionError, match=f"'{precision}' and wire_dtype bfloat16.*leave precision out, or leave wire"):
        Pipeline(FusedLinear(weight, precision=precision), devices="cpu", wire_dtype="bf16")
    for layer in (FusedLinear(weight), FusedLinear(weight, precision="fp32")):
        Pipeline(layer, devices="cpu", wire_dtype="bf16").close()
    Pipeline(FusedLinear(weight, precision=precision), devices="cpu", wire_dtype="fp32").close()
