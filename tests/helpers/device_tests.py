"""What every device must do: `DeviceTests` runs against `cpu`, `sim` and, on a GPU machine, `cuda:0`.

A subclass named Test<Device> sets `device_name`. The first half drives the device's own protocol, the second half runs
whole datasets through `Pipeline` on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.data import assert_close, assert_same_bits, batches_of, poisoned, random_layer, random_rows
from helpers.leaks import PlannedError, nothing_left_behind, small_rings

from pipeline import FusedLinear, Pipeline
from pipeline.arrays import HostArray, is_torch
from pipeline.devices.base import Device
from pipeline.devices.names import open_device
from pipeline.dtypes import DTYPES, DType, parse_dtype
from pipeline.rows import Operation


def wait(device: Device, *operations: Operation) -> None:
    end = time.monotonic() + 60
    for operation in operations:
        while not operation.done():
            assert time.monotonic() < end, "the operation isn't done after a minute"
            device.idle()


class DeviceTests:
    """The tests every device passes. Rows and features are odd on purpose: nothing is aligned to a kernel's tile."""

    device_name: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    IN, OUT, CHUNK = 37, 29, 24

    @pytest.fixture(autouse=True)
    def _rings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small_rings(monkeypatch)

    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = open_device(self.device_name)
        try:
            with device.running():
                yield device
        finally:
            device.close()

    def ready(self, device: Device, dtype: str = "float32", slots: int = 2, **options: Any) -> FusedLinear:
        """A layer, prepared and allocated on the device."""
        layer = random_layer(self.IN, self.OUT, dtype, **options)
        device.prepare(layer, layer.dtype, self.CHUNK)
        device.allocate(self.CHUNK, slots)
        return layer

    def pinned_rows(self, device: Device, rows: int, features: int, dtype: DType) -> HostArray:
        """Poisoned pinned rows in the carrier type."""
        memory = device.pinned(rows * features * dtype.itemsize)
        memory[...] = 0xFF
        return memory.view(dtype.carrier).reshape(rows, features)

    def pinned_copy(self, device: Device, x: Any, dtype: DType) -> HostArray:
        rows = self.pinned_rows(device, len(x), x.shape[1], dtype)
        rows[...] = x.view(dtype.carrier)
        return rows

    def as_values(self, rows: HostArray, dtype: DType) -> Any:
        return rows.view(ml_dtypes.bfloat16) if dtype.name == "bfloat16" else rows

    def test_device_says_what_it_is(self, device: Device) -> None:
        assert device.name == self.device_name
        assert device.description
        self.ready(device)
        assert device.kernel
        assert device.runs_as in ("ieee", "fp32")
        free = device.free_bytes()
        assert free is None or free > 0

    def test_device_clock_never_goes_back(self, device: Device) -> None:
        self.ready(device)
        times = []
        for _ in range(20):
            times.append(device.now())
            device.idle()
        assert times == sorted(times)

    @pytest.mark.parametrize("n_bytes", [1, 63, 64, 4096, 1_000_003])
    def test_device_pinned_memory_is_aligned_and_usable(self, device: Device, n_bytes: int) -> None:
        blocks = [device.pinned(n_bytes) for _ in range(3)]
        for number, block in enumerate(blocks):
            assert block.dtype == np.uint8 and block.shape == (n_bytes,) and block.flags.c_contiguous
            assert block.__array_interface__["data"][0] % 64 == 0
            block[...] = number
        for number, block in enumerate(blocks):
            assert (block == number).all()
            assert device.in_place(block), "the copy engines can use pinned memory as it is"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_device_copies_and_computes_in_the_slots_order(self, device: Device, dtype: str) -> None:
        if dtype not in self.dtypes:
            pytest.skip(f"{self.device_name} has no {dtype}")
        layer = self.ready(device, dtype)
        x = random_rows(self.CHUNK, self.IN, dtype)
        host = self.pinned_copy(device, x, layer.dtype)
        back = self.pinned_rows(device, self.CHUNK, self.OUT, layer.dtype)
        before = device.now()
        operations = [device.upload(0, first, host[first : first + 8]) for first in (0, 8, 16)]
        operations.append(device.compute(0, self.CHUNK, 0, None, None))
        operations += [device.download(0, first, back[first : first + 12]) for first in (0, 12)]
        wait(device, operations[-1])
        assert all(operation.done() for operation in operations), "the last of a slot is done after all others"
        after = device.now()
        assert_close(self.as_values(back, layer.dtype), layer, x)
        last_end = before - 1e-3
        for operation in operations:
            start, end = operation.times()
            assert last_end - 1e-5 <= start <= end <= after + 1e-3
            assert operation.times() == (start, end) and operation.done(), "an operation stays done"
            last_end = end

    def test_device_slots_are_independent(self, device: Device) -> None:
        layer = self.ready(device, slots=3)
        xs = [random_rows(self.CHUNK, self.IN, seed=seed) for seed in range(3)]
        hosts = [self.pinned_copy(device, x, layer.dtype) for x in xs]
        backs = [self.pinned_rows(device, self.CHUNK, self.OUT, layer.dtype) for _ in xs]
        for slot in (2, 0, 1):
            device.upload(slot, 0, hosts[slot])
        for slot in (1, 2, 0):
            device.compute(slot, self.CHUNK, 0, None, None)
        ends = [device.download(slot, 0, backs[slot]) for slot in (0, 2, 1)]
        wait(device, *ends)
        for x, back in zip(xs, backs, strict=True):
            assert_close(back, layer, x)

    def test_device_slot_can_be_used_again(self, device: Device) -> None:
        layer = self.ready(device, slots=1)
        for rows in (self.CHUNK, 1, 7, self.CHUNK):
            x = random_rows(rows, self.IN, seed=rows)
            back = self.pinned_rows(device, self.CHUNK, self.OUT, layer.dtype)
            device.upload(0, 0, self.pinned_copy(device, x, layer.dtype))
            device.compute(0, rows, 0, None, None)
            wait(device, device.download(0, 0, back[:rows]))
            assert_close(back[:rows], layer, x)
            assert np.isnan(back[rows:]).all(), "rows that weren't asked for were written"

    def test_device_downloads_any_part_of_a_chunk(self, device: Device) -> None:
        layer = self.ready(device)
        x = random_rows(self.CHUNK, self.IN)
        back = self.pinned_rows(device, self.CHUNK, self.OUT, layer.dtype)
        device.upload(1, 0, self.pinned_copy(device, x, layer.dtype))
        device.compute(1, self.CHUNK, 0, None, None)
        wait(device, device.download(1, 5, back[5:9]))
        assert_close(back[5:9], layer, x[5:9])
        assert np.isnan(back[:5]).all() and np.isnan(back[9:]).all()

    def test_device_row_has_the_same_bits_wherever_its_chunk_starts(self, device: Device) -> None:
        layer = self.ready(device)
        x = random_rows(self.CHUNK, self.IN)
        host = self.pinned_copy(device, x, layer.dtype)

        def computed(first: int, rows: int) -> HostArray:
            back = self.pinned_rows(device, rows, self.OUT, layer.dtype)
            device.upload(0, 0, host[first : first + rows])
            device.compute(0, rows, first, None, None)
            wait(device, device.download(0, 0, back))
            return back

        whole = computed(0, self.CHUNK)
        for first, rows in ((0, 1), (1, 5), (11, 13), (self.CHUNK - 1, 1)):
            assert_same_bits(computed(first, rows), whole[first : first + rows])

    def test_device_synchronize_waits_for_everything(self, device: Device) -> None:
        layer = self.ready(device)
        host = self.pinned_copy(device, random_rows(self.CHUNK, self.IN), layer.dtype)
        operations = [device.upload(slot, 0, host) for slot in (0, 1, 0, 1)]
        operations += [device.compute(slot, self.CHUNK, 0, None, None) for slot in (0, 1)]
        device.synchronize()
        assert all(operation.done() for operation in operations)

    def test_device_workers_run_jobs_and_pass_errors_on(self, device: Device) -> None:
        workers = device.workers()
        if workers is None:
            pytest.skip(f"{self.device_name} has no workers of its own")
        ran: list[int] = []

        def fail() -> None:
            raise PlannedError

        wait(device, *[workers.submit(lambda n=n: ran.append(n)) for n in range(9)])
        assert sorted(ran) == list(range(9))
        with pytest.raises(PlannedError):
            wait(device, workers.submit(fail))
        assert workers.description
        workers.close()

    def test_device_close_twice_and_open_again(self) -> None:
        with nothing_left_behind():
            for _ in range(3):
                device = open_device(self.device_name)
                layer = self.ready(device)
                x = random_rows(self.CHUNK, self.IN)
                back = self.pinned_rows(device, self.CHUNK, self.OUT, layer.dtype)
                with device.running():
                    device.upload(0, 0, self.pinned_copy(device, x, layer.dtype))
                    device.compute(0, self.CHUNK, 0, None, None)
                    wait(device, device.download(0, 0, back))
                assert_close(back, layer, x)
                del back
                device.close()
                device.close()

    def test_device_close_without_prepare(self) -> None:
        with nothing_left_behind():
            open_device(self.device_name).close()

    # -- whole runs ----------------------------------------------------------------------------------------------------

    def pipeline(self, layer: FusedLinear, **options: Any) -> Pipeline:
        return Pipeline(layer, devices=self.device_name, **{"chunk_rows": 40, "num_streams": 3, **options})

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
    def test_run_gives_the_references_values(self, dtype: str, bias: bool) -> None:
        if dtype not in self.dtypes:
            pytest.skip(f"{self.device_name} has no {dtype}")
        for seed, (rows, in_features, out_features) in enumerate(
            [(1, 1, 1), (203, 37, 29), (97, 8, 130), (40, 130, 3)]
        ):
            layer = random_layer(in_features, out_features, dtype, bias=bias, seed=seed)
            x = random_rows(rows, in_features, dtype, seed)
            out = poisoned((rows, out_features), dtype)
            with self.pipeline(layer) as pipeline:
                result = pipeline.run(x, out)
            assert result.out is out
            assert_close(out, layer, x)
            assert result.stats.rows == rows and result.stats.chunks == -(-rows // 40)

    @pytest.mark.parametrize("out_dtype", ["float64", "float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_run_rounds_once_to_any_out_dtype(self, dtype: str, out_dtype: str) -> None:
        if out_dtype not in self.dtypes:
            pytest.skip(f"{self.device_name} has no {out_dtype}")
        layer, x = random_layer(19, 23, dtype), random_rows(101, 19, dtype)
        with self.pipeline(layer, out_dtype=out_dtype) as pipeline:
            out = pipeline.run(x).out
        assert parse_dtype(out.dtype) is DTYPES[out_dtype]
        assert_close(out, layer, x)

    def sources(self, x: HostArray, folder: Path) -> dict[str, Callable[[], Any]]:
        """The same float32 rows as every kind of host source."""
        wide = np.full((2 * len(x) + 1, x.shape[1] + 3), np.nan, x.dtype)
        wide[1::2, 1:-2] = x
        np.save(folder / "x.npy", x)
        np.save(folder / "fortran.npy", np.asfortranarray(x))
        np.save(folder / "big.npy", x.astype(x.dtype.newbyteorder(">")))
        return {
            "array": lambda: x,
            "Fortran array": lambda: np.asfortranarray(x),
            "negative strides": lambda: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
            "strided view": lambda: wide[1::2, 1:-2],
            "big-endian": lambda: x.astype(x.dtype.newbyteorder(">")),
            "memmap": lambda: np.load(folder / "x.npy", mmap_mode="r"),
            "path": lambda: folder / "x.npy",
            "Fortran path": lambda: str(folder / "fortran.npy"),
            "big-endian path": lambda: folder / "big.npy",
            "tensor": lambda: torch.from_numpy(x),
            "strided tensor": lambda: torch.from_numpy(wide)[1::2, 1:-2],
            "transposed tensor": lambda: torch.from_numpy(np.ascontiguousarray(x.T)).T,
            "list": lambda: [x[:50], x[50:51], x[51:51], x[51:]],
            "generator": lambda: batches_of(x, [7, 90, 3]),
            "tensors": lambda: batches_of(torch.from_numpy(x), [64]),
        }

    def test_run_takes_every_source_with_the_same_bits(self, tmp_path: Path) -> None:
        layer, x = random_layer(self.IN, self.OUT), random_rows(333, self.IN)
        with self.pipeline(layer) as pipeline:
            expected = pipeline.run(x).out
            assert_close(expected, layer, x)
            for kind, source in self.sources(x, tmp_path).items():
                out = pipeline.run(source()).out
                assert is_torch(out) == ("tensor" in kind), kind
                assert_same_bits(out, expected)

    def test_run_fills_every_sink_with_the_same_bits(self, tmp_path: Path) -> None:
        layer, x = random_layer(self.IN, self.OUT), random_rows(333, self.IN)
        shape = (333, self.OUT)
        wide = poisoned((2 * 333, self.OUT + 5))
        mapped = np.lib.format.open_memmap(tmp_path / "mapped.npy", "w+", np.float32, shape)
        mapped[...] = np.nan
        sinks = {
            "array": poisoned(shape),
            "Fortran array": np.asfortranarray(poisoned(shape)),
            "strided view": wide[::2, 2:-3],
            "reversed": poisoned(shape)[::-1, ::-1],
            "big-endian": poisoned(shape).astype(">f4"),
            "tensor": torch.full(shape, torch.nan),
            "strided tensor": torch.full((333, 2 * self.OUT), torch.nan)[:, ::2],
            "memmap": mapped,
        }
        with self.pipeline(layer) as pipeline:
            expected = pipeline.run(x).out
            for kind, out in sinks.items():
                assert pipeline.run(x, out).out is out, kind
                assert_same_bits(out, expected)
            assert np.isnan(wide[1::2]).all() and np.isnan(wide[:, :2]).all() and np.isnan(wide[:, -3:]).all()
            path = pipeline.run(x, tmp_path / "y.npy").out
            assert_same_bits(np.load(path), expected)
            assert path == tmp_path / "y.npy"
        assert list(tmp_path.glob("*.partial")) == []

    def test_run_same_bits_for_any_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x = random_layer(self.IN, self.OUT), random_rows(300, self.IN)
        with self.pipeline(layer, chunk_rows=300) as pipeline:
            expected = pipeline.run(x).out
        choose = np.random.default_rng(1)
        for chunk_rows, num_streams in [(1, 1), (7, 2), (64, 5), (100, 3), (299, 1), (1000, 4)]:
            small_rings(monkeypatch, int(choose.integers(100, 20_000)), int(choose.integers(1, 6)))
            with self.pipeline(layer, chunk_rows=chunk_rows, num_streams=num_streams) as pipeline:
                assert_same_bits(pipeline.run(x).out, expected)
                sizes = choose.integers(0, 60, 40).tolist()
                assert_same_bits(pipeline.run(batches_of(x, [*sizes, 50])).out, expected)

    @pytest.mark.parametrize("empty", ["array", "tensor", "no batches", "empty batches"])
    def test_run_of_no_rows_gives_a_valid_empty_result(self, empty: str, tmp_path: Path) -> None:
        layer, none = random_layer(5, 3), np.empty((0, 5), np.float32)
        make = {
            "array": lambda: none,
            "tensor": lambda: torch.from_numpy(none),
            "no batches": lambda: iter(()),
            "empty batches": lambda: [none, none],
        }[empty]
        with self.pipeline(layer) as pipeline:
            result = pipeline.run(make())
            assert tuple(result.out.shape) == (0, 3)
            assert result.stats.rows == 0 and result.stats.bound == "none" and str(result.stats)
            assert np.load(pipeline.run(make(), tmp_path / "y.npy").out).shape == (0, 3)

    def test_run_keeps_nan_and_infinity_in_their_rows(self) -> None:
        layer, x = random_layer(self.IN, self.OUT), random_rows(90, self.IN)
        x[13, 4], x[50, 0], x[89, 36] = np.nan, np.inf, -np.inf
        with self.pipeline(layer) as pipeline:
            out = pipeline.run(x).out
        with np.errstate(all="ignore"):
            expected = layer.reference(x)
        assert (np.isnan(out) == np.isnan(expected)).all()
        assert (np.isposinf(out) == np.isposinf(expected)).all()
        assert (np.isneginf(out) == np.isneginf(expected)).all()
        clean = [row for row in range(90) if row not in (13, 50, 89)]
        assert_close(out[clean], layer, x[clean])

    def test_stream_gives_each_batch_its_result(self) -> None:
        layer, x = random_layer(self.IN, self.OUT), random_rows(333, self.IN)
        sizes = [5, 0, 100, 41, 1, 186]
        edges = np.cumsum([0, *sizes])
        with self.pipeline(layer) as pipeline:
            expected = pipeline.run(x).out
            results = list(pipeline.stream(x[a:b] for a, b in pairwise(edges)))
        assert [len(result) for result in results] == sizes
        assert_same_bits(np.concatenate(results), expected)

    def test_run_reports_its_stages(self) -> None:
        layer, x = random_layer(self.IN, self.OUT), np.asfortranarray(random_rows(400, self.IN))
        seen, out = [], np.empty((400, self.OUT), np.float32, order="F")  # neither end can be used in place
        with self.pipeline(layer) as pipeline:
            stats = pipeline.run(x, out, progress=seen.append).stats
        assert stats.stages["H2D"].bytes == x.nbytes and stats.stages["D2H"].bytes == 400 * self.OUT * 4
        assert stats.stages["kernel"].count == stats.chunks == len(seen) == 10
        assert all(stats.stages[name].busy_s > 0 for name in ("H2D", "kernel", "D2H"))
        assert stats.run_s > 0 and stats.seconds == stats.setup_s + stats.run_s + stats.finish_s
        assert self.device_name in stats.devices
        assert seen[-1].rows_done == seen[-1].rows_total == 400

    def failures(self, x: HostArray, folder: Path) -> dict[str, dict[str, Any]]:
        """Keyword arguments of runs that fail half way, each with a PlannedError."""

        def half() -> Iterator[HostArray]:
            yield x[:150]
            raise PlannedError

        def refuse(progress: Any) -> None:
            if progress.rows_done > 100:
                raise PlannedError

        return {
            "iterable": {"source": half()},
            "iterable to a path": {"source": half(), "out": folder / "a.npy"},
            "progress": {"source": x, "progress": refuse},
            "progress to a path": {"source": x, "out": folder / "b.npy", "progress": refuse},
        }

    def test_run_errors_leave_nothing_behind_and_the_next_run_works(self, tmp_path: Path) -> None:
        layer, x = random_layer(self.IN, self.OUT), random_rows(333, self.IN)
        with nothing_left_behind(tmp_path):
            with self.pipeline(layer) as pipeline:
                expected = pipeline.run(x).out
                with nothing_left_behind(tmp_path, copy_workers=False):
                    for kind, arguments in self.failures(x, tmp_path).items():
                        with pytest.raises(PlannedError) as caught:
                            pipeline.run(**arguments)
                        assert any(note.startswith("pipeline: in ") for note in caught.value.__notes__), kind
                        assert_same_bits(pipeline.run(x).out, expected)
                assert list(tmp_path.iterdir()) == []
                with pytest.raises(PlannedError):
                    for _ in pipeline.stream(self.failures(x, tmp_path)["iterable"]["source"]):
                        pass
                assert_same_bits(pipeline.run(x).out, expected)

    def test_two_jobs_at_once_are_independent(self) -> None:
        layers = [random_layer(self.IN, self.OUT, seed=seed) for seed in range(2)]
        xs = [random_rows(500, self.IN, seed=seed) for seed in range(2)]
        results: dict[int, Any] = {}

        def job(number: int) -> None:
            with self.pipeline(layers[number]) as pipeline:
                results[number] = [pipeline.run(xs[number]).out for _ in range(3)]

        threads = [threading.Thread(target=job, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in range(2):
            for out in results[number]:
                assert_close(out, layers[number], xs[number])
