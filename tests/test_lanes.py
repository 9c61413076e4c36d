"""The staging lanes in C, with a CPU for the device and tests/native/fake_driver.c for the CUDA driver."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_tests import DeviceTests, assert_same_bits, poisoned, random_layer, random_rows, wait_until
from needs import IN_CI

import pipeline.devices.cpu
from pipeline import Pipeline
from pipeline.arrays import HostArray, address_of
from pipeline.config import Staging
from pipeline.devices.base import NativeCopies
from pipeline.devices.cpu import CpuDevice
from pipeline.dtypes import DType
from pipeline.errors import DriverError, FileFormatError, PipelineError
from pipeline.flow import DeviceRows
from pipeline.instrument import STAGE_COLORS, STAGES, Ranges
from pipeline.io.memory import ArrayRows
from pipeline.layer.linear import FusedLinear
from pipeline.report.trace import read_trace
from pipeline.staging import native
from pipeline.staging.native import NativeWorkers
from pipeline.staging.native_mover import StagingLanes

_FUNCTIONS = ("fake_set_context", "fake_copy_in", "fake_copy_out", "fake_record", "fake_query")
_REFUSAL, _FAILURE = 0, 1
_NOT_READY = 600


@functools.cache
def fake_driver() -> Any:
    """The library, or None where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    source = Path(__file__).resolve().parent / "native" / "fake_driver.c"
    built = Path(tempfile.mkdtemp(prefix="pipeline-fake-driver-")) / "fake_driver.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-pthread", "-o", str(built), str(source)], check=True)
    library = ctypes.CDLL(str(built))
    library.fake_open_stream.argtypes, library.fake_open_stream.restype = [ctypes.c_uint64], ctypes.c_void_p
    library.fake_close_stream.argtypes = library.fake_query.argtypes = [ctypes.c_void_p]
    library.fake_pend.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.fake_new_event.restype = ctypes.c_void_p
    shutil.rmtree(built.parent)
    return library


class LanesDevice(CpuDevice):
    """A CPU to whose slots rows are staged, by the lanes in C, unless they are in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: list[tuple[int, int]] = []

    def pinned(self, n_bytes: int) -> HostArray:
        memory = super().pinned(n_bytes)
        self._pinned.append((address_of(memory), n_bytes))
        return memory

    def prepare(self, layer: FusedLinear, out_dtype: DType, chunk_rows: int) -> None:
        super().prepare(layer, out_dtype, chunk_rows)
        self._fake_streams = [fake_driver().fake_open_stream(seed) for seed in (1, 2)]
        self._kernel_events: dict[int, int] = {}

    def in_place(self, rows: HostArray) -> bool:
        first = address_of(rows)
        return any(start <= first and first + rows.nbytes <= start + n_bytes for start, n_bytes in self._pinned)

    def own_rows(self, rows: HostArray) -> DeviceRows | None:
        return None

    def native_copies(self) -> NativeCopies | None:
        functions = (getattr(fake_driver(), name) for name in _FUNCTIONS)
        return NativeCopies(
            tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions),
            1,
            *self._fake_streams,
            new_event=fake_driver().fake_new_event,
            input=lambda slot: address_of(self._inputs[slot]),
            output=lambda slot: address_of(self._outputs[slot]),
            before_kernel=self._before_kernel,
            after_kernel=self._after_kernel,
            error=lambda what, code: DriverError(f"{what} failed: {code}", str(code)),
        )

    def _before_kernel(self, slot: int, event: int) -> None:
        self._queue("kernel", slot, lambda: wait_until(lambda: fake_driver().fake_query(event) != _NOT_READY))

    def _after_kernel(self, slot: int) -> int:
        event = self._kernel_events.setdefault(slot, fake_driver().fake_new_event())
        fake_driver().fake_pend(event, 1)
        self._queue("kernel", slot, lambda: fake_driver().fake_pend(event, -1))
        return event

    def close(self) -> None:
        super().close()
        for stream in self.__dict__.pop("_fake_streams", []):
            fake_driver().fake_close_stream(stream)


@pytest.fixture(autouse=True)
def lanes_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device "cpu" is a LanesDevice, and rings are short: a chunk has more pieces than fit."""
    if native.workers_kind() != "native" or fake_driver() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(pipeline.devices.cpu, "CpuDevice", LanesDevice)
    monkeypatch.setenv("PIPELINE_PIECE_BYTES", "800")
    monkeypatch.setenv("PIPELINE_RING_PIECES", "3")
    yield
    fake_driver().fake_trouble(_REFUSAL, -1)
    fake_driver().fake_trouble(_FAILURE, -1)


class TestLanes(DeviceTests):
    device_name = "cpu"
    dtypes = ("float64", "float32", "bfloat16", "float16")


def open_pipeline(layer: FusedLinear, **options: Any) -> Pipeline:
    return Pipeline(layer, devices="cpu", chunk_rows=40, num_streams=3, **options)


def rings_used(pipe: Pipeline) -> tuple[bool, bool, bool, bool]:
    """Whether the loop's own rings were used, and the lanes'."""
    executor = pipe.fleet.stations[0].executor
    rings = (executor.ring_in, executor.ring_out, *executor._lanes_rings)
    loop_in, loop_out, lanes_in, lanes_out = (ring.allocated_bytes > 0 for ring in rings)
    return loop_in, loop_out, lanes_in, lanes_out


@pytest.mark.parametrize("wire", [None, "bf16", "fp16"])
@pytest.mark.parametrize("columns", ["contiguous", "strided"])
def test_lanes_move_all_pieces(wire: str | None, columns: str) -> None:
    layer, x = random_layer(33, 17), random_rows(237, 50)
    x = np.ascontiguousarray(x[:, :33]) if columns == "contiguous" else x[:, 9:42]
    y = poisoned((237, 20))[:, 1:18]
    with open_pipeline(layer, wire_dtype=wire) as pipe:
        stats = pipe.run(x, y).stats
        assert rings_used(pipe) == (False, False, True, True)
        assert stats.pinned_bytes == pipe.fleet.stations[0].executor.pinned_bytes
    with Pipeline(layer, devices="sim", chunk_rows=40, wire_dtype=wire) as by_the_loop:
        assert_same_bits(y, by_the_loop.run(x).out)
    piece_rows = [max(1, 800 // (features * (2 if wire else 4))) for features in (33, 17)]
    chunks = [40] * 5 + [37]
    pieces = [sum(-(-rows // each) for rows in chunks) for each in piece_rows]
    counts = {name: stage.count for name, stage in stats.stages.items()}
    assert counts == {"fill": pieces[0], "H2D": pieces[0], "kernel": 6, "D2H": pieces[1], "drain": pieces[1]}
    assert stats.stages["H2D"].bytes == 237 * 33 * (2 if wire else 4) == stats.stages["fill"].bytes
    assert stats.stages["D2H"].bytes == 237 * 17 * (2 if wire else 4) == stats.stages["drain"].bytes


def test_lanes_read_and_write_files(tmp_path: Path) -> None:
    layer, x = random_layer(24, 31), random_rows(300, 24)
    np.save(tmp_path / "x.npy", x)
    with open_pipeline(layer) as pipe:
        pipe.run(tmp_path / "x.npy", tmp_path / "y.npy")
        assert_same_bits(np.load(tmp_path / "y.npy"), layer(x))
        assert rings_used(pipe) == (False, False, True, True)


def test_lanes_leave_what_they_cannot_read_to_the_loop(tmp_path: Path) -> None:
    layer, x = random_layer(24, 31), random_rows(300, 24)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(tmp_path / "x.npy").out, layer(x))
        assert rings_used(pipe) == (True, False, False, True)
        assert_same_bits(pipe.run(x, np.empty((300, 31), "f4", order="F")).out, layer(x))
        assert rings_used(pipe) == (True, True, True, True)


def test_lanes_are_not_used_without_native_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_NATIVE_COPY", "0")
    layer, x = random_layer(24, 31), random_rows(300, 24)
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(x).out, layer(x))
        assert rings_used(pipe) == (True, True, False, False)


def test_lanes_poison_pieces_in_debug_mode_and_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEBUG", "1")
    layer, x = random_layer(24, 31), random_rows(300, 24)
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(x).out, layer(x))
        for ring in pipe.fleet.stations[0].executor._lanes_rings:
            assert ring.allocated_bytes and all((memory == 0xFF).all() for memory in ring._memory)


def cut_file(path: Path, x: HostArray) -> Callable[[Any], None]:
    """After the first chunk, a file of which the second half is missing."""

    def cut(progress: Any) -> None:
        with path.open("r+b") as file:
            file.truncate(x.nbytes // 2)

    return cut


def test_lanes_report_a_file_that_is_cut_and_the_next_run_works(tmp_path: Path) -> None:
    layer, x = random_layer(24, 31), random_rows(3000, 24)
    np.save(tmp_path / "x.npy", x)
    with open_pipeline(layer) as pipe:
        with pytest.raises(FileFormatError, match=r"x.npy ended at byte \d+") as raised:
            pipe.run(tmp_path / "x.npy", progress=cut_file(tmp_path / "x.npy", x))
        assert any("in fill of chunk" in note for note in raised.value.__notes__)
        assert_same_bits(pipe.run(x).out, layer(x))


@pytest.mark.parametrize("how", [_REFUSAL, _FAILURE])
@pytest.mark.parametrize("copies", [0, 7, 40])
def test_lanes_report_a_copy_that_fails_on_the_device(how: int, copies: int) -> None:
    layer, x = random_layer(24, 31), random_rows(1000, 24)
    with open_pipeline(layer) as pipe:
        fake_driver().fake_trouble(how, copies)
        with pytest.raises(DriverError, match=r"(H2D|D2H) copy of slot \d failed: (1|700)") as raised:
            pipe.run(x)
        assert any("in H2D of chunk" in note or "in D2H of chunk" in note for note in raised.value.__notes__)
        if how == _REFUSAL:  # the other error stays, as that of a lost GPU does
            assert_same_bits(pipe.run(x).out, layer(x))


@pytest.mark.parametrize("looks", [1, 2, 5, 20, 60])
def test_lanes_give_up_when_the_run_is_interrupted(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer(24, 31), random_rows(4000, 24)
    y = poisoned((4000, 31))
    with open_pipeline(layer) as pipe:
        left, idle = [looks], LanesDevice.idle

        def interrupted(device: LanesDevice) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            idle(device)

        monkeypatch.setattr(LanesDevice, "idle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipe.run(x, y)
        kept = y.copy()  # nothing writes to the caller's memory any more
        monkeypatch.undo()
        lanes = pipe.fleet.stations[0].executor._lanes
        assert lanes is not None and not lanes._transfers
        np.testing.assert_array_equal(y, kept)
        assert_same_bits(pipe.run(x, y).out, layer(x))


def test_lanes_transfer_that_was_cancelled_says_so() -> None:
    layer, x = random_layer(24, 31), random_rows(400, 24)
    with open_pipeline(layer) as pipe:
        pipe.run(x)
        lanes = pipe.fleet.stations[0].executor._lanes
        assert lanes is not None
        transfers = [lanes.load(ArrayRows(x[:40]), 40, slot, slot) for slot in range(3)]
        lanes.cancel()
        ended = 0
        for transfer in transfers:
            assert transfer is not None
            try:
                ended += transfer.done()  # one that had come through before
            except PipelineError as error:
                assert "H2D copy of slot" in str(error) and "cancelled" in str(error)
                ended += 1
        assert ended == 3


def test_lanes_with_other_workers_and_rings_between_runs() -> None:
    layer, x = random_layer(24, 31), random_rows(400, 24)
    freed: list[HostArray] = []
    with open_pipeline(layer) as pipe:
        executor = pipe.fleet.stations[0].executor
        pipe.run(x)
        before = executor.pinned_bytes
        executor.device.free_pinned = freed.append  # type: ignore[method-assign]
        workers = NativeWorkers(1)
        executor.restage(workers, Staging(1600, 2, 1))
        assert sum(memory.nbytes for memory in freed) == before and executor.pinned_bytes == 0
        assert_same_bits(pipe.run(x).out, layer(x))
        assert rings_used(pipe) == (False, False, True, True)
        executor.close()
        workers.close()


def test_lanes_of_two_devices_share_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str) -> LanesDevice:
        device = LanesDevice()
        device.name = name
        return device

    monkeypatch.setattr("pipeline.fleet.find_devices", lambda wanted: ["one", "two"])
    monkeypatch.setattr("pipeline.fleet.open_device", named)
    layer, x = random_layer(24, 31), random_rows(4000, 24)
    y = poisoned((4000, 31))
    with open_pipeline(layer) as pipe:
        for _ in range(3):
            y.fill(np.nan)
            stats = pipe.run(x, y).stats
            assert_same_bits(y, layer(x))
        assert set(stats.devices) == {"one", "two"}
        lanes = [lane.executor._lanes for lane in pipe.fleet.stations]
        assert None not in lanes and lanes[0] is not lanes[1]
        assert pipe.fleet.stations[0].workers is pipe.fleet.stations[1].workers


def test_lanes_end_their_thread_when_closed_and_when_forgotten() -> None:
    def lanes_threads() -> int:
        names = (Path(f"/proc/self/task/{each.name}/comm").read_text() for each in Path("/proc/self/task").iterdir())
        return sum(name.strip() == "pipeline-lanes" for name in names)

    before = lanes_threads()
    layer, x = random_layer(24, 31), random_rows(400, 24)
    pipe = open_pipeline(layer)
    pipe.run(x)
    assert lanes_threads() == before + 1
    lanes = pipe.fleet.stations[0].executor._lanes
    assert isinstance(lanes, StagingLanes)
    pipe.close()
    assert lanes_threads() == before
    lanes.close()  # again

    forgotten = open_pipeline(layer)
    forgotten.run(x)
    assert lanes_threads() == before + 1
    del forgotten
    gc.collect()
    assert lanes_threads() == before


PROFILED = """
import pipeline.devices.cpu, test_lanes, threading
pipeline.devices.cpu.CpuDevice = test_lanes.LanesDevice
layer, x = test_lanes.random_layer(24, 31), test_lanes.random_rows(200, 24)
with test_lanes.open_pipeline(layer) as pipe:
    stats = pipe.run(x).stats
    lanes = pipe.fleet.stations[0].executor._lanes
print(lanes is not None, *(stats.stages[stage].count for stage in ("fill", "H2D", "D2H", "drain")))
"""


def test_lanes_make_ranges_that_profilers_see(tmp_path: Path) -> None:
    library, _ = native._library()
    if not library.host_lanes_have_ranges() and not IN_CI:
        pytest.skip("the package was built without NVTX's headers")
    assert library.host_lanes_have_ranges()
    tool, log = tmp_path / "tool.so", tmp_path / "log"
    source = Path(__file__).resolve().parent / "native" / "nvtx_tool.c"
    compiler = shutil.which("gcc") or shutil.which("cc") or ""
    subprocess.run([compiler, "-shared", "-fPIC", "-pthread", "-o", str(tool), str(source)], check=True)
    variables = {"NVTX_INJECTION64_PATH": str(tool), "NVTX_TOOL_LOG": str(log)}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, (source.parents[1], source.parents[2])))
    done = subprocess.run([sys.executable, "-c", PROFILED], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    in_c, *counts = done.stdout.split()
    count = dict(zip(("fill", "H2D", "D2H", "drain"), map(int, counts), strict=True))
    assert in_c == "True"
    events = [line.split() for line in log.read_text().splitlines()]  # what, thread, name, payload, color; id
    copies = [event for event in events if event[0] == "push" and event[2] in ("H2D", "D2H")]
    (lanes_thread,) = {thread for _, thread, *_ in copies}
    assert {stage: sum(name == stage for _, _, name, *_ in copies) for stage in ("H2D", "D2H")} == {
        stage: count[stage] for stage in ("H2D", "D2H")
    }
    of_thread = [what for what, thread, *_ in events if thread == lanes_thread and what in ("push", "pop")]
    assert of_thread == ["push", "pop"] * len(copies), "one call of the driver in each"
    started = {event[5]: event for event in events if event[0] == "start"}
    assert sorted(event[2] for event in events if event[0] == "end") == sorted(started)
    work = [event for event in started.values() if event[2] in ("fill", "drain")]
    assert {stage: sum(event[2] == stage for event in work) for stage in ("fill", "drain")} == {
        stage: count[stage] for stage in ("fill", "drain")
    }
    for stage in ("fill", "H2D", "D2H", "drain"):
        own = [event for event in copies + work if event[2] == stage]
        assert {int(event[3]) for event in own} == set(range(5)), "chunks"
        assert {int(event[4], 16) & 0xFFFFFF for event in own} == {STAGE_COLORS[stage]}
    assert any(event[:1] + event[2:3] == ["push", "kernel"] for event in events), "the loop's are there as well"


def test_lanes_that_profilers_would_not_see_leave_the_pieces_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer(24, 31), random_rows(400, 24)
    monkeypatch.setattr("pipeline.executor.show_in_profiles", lambda workers: False)
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(x).out, layer(x))
        assert rings_used(pipe) == (False, False, True, True), "nobody profiles"
    monkeypatch.setattr(Ranges, "active", property(lambda self: True, lambda self, value: None), raising=False)
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(x).out, layer(x))
        assert rings_used(pipe) == (True, True, False, False)


def test_lanes_in_a_trace(tmp_path: Path) -> None:
    layer, x = random_layer(24, 31), random_rows(400, 24)
    with open_pipeline(layer) as pipe:
        stats = pipe.run(x, trace=tmp_path / "run.json").stats
    timeline, _ = read_trace(tmp_path / "run.json")
    intervals = timeline.devices["cpu"]
    for stage in STAGES:
        own = [each for each in intervals if each.stage == stage]
        assert len(own) == stats.stages[stage].count and {each.chunk for each in own} == set(range(10))
    for chunk in range(10):
        first, last = (
            {s: f(i for i in intervals if i.stage == s and i.chunk == chunk) for s in STAGES}
            for f in (lambda own: min(i.start_s for i in own), lambda own: max(i.end_s for i in own))
        )
        assert first["fill"] <= first["H2D"] and last["fill"] <= last["H2D"] <= first["kernel"] + 1e-3
        assert last["kernel"] <= first["D2H"] + 1e-3 and first["D2H"] <= first["drain"] and last["D2H"] <= last["drain"]
