"""Pipelines whose rows are moved by C, on a CPU with tests/native/fake_driver.c for the CUDA driver."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, poisoned, random_layer, random_rows
from helpers.device_tests import DeviceTests
from helpers.leaks import wait_until
from helpers.native_device import FAILURE, NATIVE, REFUSAL, NativeDevice, compiler, fake_driver
from helpers.needs import IN_CI

import pipeline.devices.cpu
from pipeline import FusedLinear, Pipeline
from pipeline.arrays import HostArray
from pipeline.config import Staging
from pipeline.errors import DriverError, FileFormatError
from pipeline.instrument import STAGE_COLORS, STAGES, Interval, Ranges
from pipeline.report.trace import read_trace
from pipeline.staging import host_library, native
from pipeline.staging.movers import Movers
from pipeline.staging.native import NativeWorkers


@pytest.fixture(autouse=True)
def native_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device "cpu" is a NativeDevice, and rings are short: a chunk has more pieces than fit."""
    if native.workers_kind() != "native":
        pytest.skip("no C compiler")
    monkeypatch.setattr(pipeline.devices.cpu, "CpuDevice", NativeDevice)
    monkeypatch.setenv("PIPELINE_PIECE_BYTES", "800")
    monkeypatch.setenv("PIPELINE_RING_PIECES", "3")
    yield
    fake_driver().fake_trouble(REFUSAL, -1)
    fake_driver().fake_trouble(FAILURE, -1)


class TestNativeDevice(DeviceTests):
    device_name = "cpu"
    dtypes = ("float64", "float32", "bfloat16", "float16")


def open_pipeline(layer: FusedLinear, **options: Any) -> Pipeline:
    return Pipeline(layer, devices="cpu", chunk_rows=40, num_streams=3, **options)


def movers_of(pipe: Pipeline, device: int = 0) -> Movers:
    return pipe.fleet.stations[device].movers


def used(movers: Movers) -> set[str]:
    """The rings that rows have gone through."""
    return {
        f"{name} {way}"
        for name, rings in movers.rings.items()
        for way, ring in (("load", rings.load), ("store", rings.store))
        if ring.allocated_bytes
    }


BY_C, BY_PYTHON = {"native load", "native store"}, {"Python load", "Python store"}


@pytest.mark.parametrize("wire", [None, "bf16", "fp16"])
@pytest.mark.parametrize("columns", ["contiguous", "strided"])
def test_native_mover_moves_all_pieces(wire: str | None, columns: str) -> None:
    layer, x = random_layer(33, 17), random_rows(237, 50)
    x = np.ascontiguousarray(x[:, :33]) if columns == "contiguous" else x[:, 9:42]
    y = poisoned((237, 20))[:, 1:18]
    with open_pipeline(layer, wire_dtype=wire) as pipe:
        stats = pipe.run(x, y).stats
        assert used(movers_of(pipe)) == BY_C
        assert stats.pinned_bytes == movers_of(pipe).pinned_bytes
    with Pipeline(layer, devices="sim", chunk_rows=40, wire_dtype=wire) as by_the_loop:
        assert_same_bits(y, by_the_loop.run(x).out)
    piece_rows = [max(1, 800 // (features * (2 if wire else 4))) for features in (33, 17)]
    chunks = [40] * 5 + [37]
    pieces = [sum(-(-rows // each) for rows in chunks) for each in piece_rows]
    counts = {name: stage.count for name, stage in stats.stages.items()}
    assert counts == {"fill": pieces[0], "H2D": pieces[0], "kernel": 6, "D2H": pieces[1], "drain": pieces[1]}
    assert stats.stages["H2D"].bytes == 237 * 33 * (2 if wire else 4) == stats.stages["fill"].bytes
    assert stats.stages["D2H"].bytes == 237 * 17 * (2 if wire else 4) == stats.stages["drain"].bytes


def test_native_mover_reads_and_writes_files(tmp_path: Path) -> None:
    layer, x = random_layer(24, 31), random_rows(300, 24)
    np.save(tmp_path / "x.npy", x)
    with open_pipeline(layer) as pipe:
        pipe.run(tmp_path / "x.npy", tmp_path / "y.npy")
        assert_same_bits(np.load(tmp_path / "y.npy"), layer(x))
        assert used(movers_of(pipe)) == BY_C


def test_native_mover_leaves_what_it_cannot_read_to_python(tmp_path: Path) -> None:
    layer, x = random_layer(24, 31), random_rows(300, 24)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(tmp_path / "x.npy").out, layer(x))
        assert used(movers_of(pipe)) == {"Python load", "native store"}
        assert_same_bits(pipe.run(x, np.empty((300, 31), "f4", order="F")).out, layer(x))
        assert used(movers_of(pipe)) == BY_C | BY_PYTHON


def test_native_mover_is_not_used_without_native_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_NATIVE_COPY", "0")
    layer, x = random_layer(24, 31), random_rows(300, 24)
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(x).out, layer(x))
        assert used(movers_of(pipe)) == BY_PYTHON


def test_native_mover_poisons_pieces_in_debug_mode_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEBUG", "1")
    layer, x = random_layer(24, 31), random_rows(300, 24)
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(x).out, layer(x))
        for ring in (movers_of(pipe).rings["native"].load, movers_of(pipe).rings["native"].store):
            assert ring.allocated_bytes
            assert all((ring.rows(n, ring.piece_rows).view(np.uint8) == 0xFF).all() for n in range(ring.pieces))


def cut_file(path: Path, x: HostArray) -> Callable[[Any], None]:
    """After the first chunk, a file of which the second half is missing."""

    def cut(progress: Any) -> None:
        with path.open("r+b") as file:
            file.truncate(x.nbytes // 2)

    return cut


def test_native_mover_reports_a_file_that_is_cut_and_the_next_run_works(tmp_path: Path) -> None:
    layer, x = random_layer(24, 31), random_rows(3000, 24)
    np.save(tmp_path / "x.npy", x)
    with open_pipeline(layer) as pipe:
        with pytest.raises(FileFormatError, match=r"x.npy ended at byte \d+") as raised:
            pipe.run(tmp_path / "x.npy", progress=cut_file(tmp_path / "x.npy", x))
        assert any("in fill of chunk" in note for note in raised.value.__notes__)
        assert_same_bits(pipe.run(x).out, layer(x))


@pytest.mark.parametrize("how", [REFUSAL, FAILURE])
@pytest.mark.parametrize("copies", [0, 7, 40])
def test_native_mover_reports_a_copy_that_fails_on_the_device(how: int, copies: int) -> None:
    layer, x = random_layer(24, 31), random_rows(1000, 24)
    with open_pipeline(layer) as pipe:
        fake_driver().fake_trouble(how, copies)
        with pytest.raises(DriverError, match=r"(H2D|D2H) copy of slot \d failed: (1|700)") as raised:
            pipe.run(x)
        assert any("in H2D of chunk" in note or "in D2H of chunk" in note for note in raised.value.__notes__)
        if how == REFUSAL:  # the other error stays, as that of a lost GPU does
            assert_same_bits(pipe.run(x).out, layer(x))


@pytest.mark.parametrize("looks", [1, 2, 5, 20, 60])
def test_native_mover_gives_up_when_the_run_is_interrupted(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer(24, 31), random_rows(4000, 24)
    y = poisoned((4000, 31))
    with open_pipeline(layer) as pipe:
        left, idle = [looks], NativeDevice.idle

        def interrupted(device: NativeDevice) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            idle(device)

        monkeypatch.setattr(NativeDevice, "idle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipe.run(x, y)
        kept = y.copy()  # nothing writes to the caller's memory any more
        monkeypatch.undo()
        np.testing.assert_array_equal(y, kept)
        assert_same_bits(pipe.run(x, y).out, layer(x))


def test_native_mover_with_other_workers_and_rings_between_runs() -> None:
    layer, x = random_layer(24, 31), random_rows(400, 24)
    freed: list[HostArray] = []
    with open_pipeline(layer) as pipe:
        movers = movers_of(pipe)
        pipe.run(x)
        before = movers.pinned_bytes
        pipe.fleet.stations[0].device.free_pinned = freed.append  # type: ignore[method-assign]
        workers = NativeWorkers(1)
        movers.restage(workers, Staging(1600, 2, 1))
        assert sum(memory.nbytes for memory in freed) == before and movers.pinned_bytes == 0
        assert_same_bits(pipe.run(x).out, layer(x))
        assert used(movers_of(pipe)) == BY_C
        movers.close()
        workers.close()


def test_native_movers_of_two_devices_share_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str) -> NativeDevice:
        device = NativeDevice()
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
        assert used(movers_of(pipe, 0)) == used(movers_of(pipe, 1)) == BY_C
        assert pipe.fleet.stations[0].workers is pipe.fleet.stations[1].workers


def test_native_mover_ends_its_thread_when_closed_and_when_forgotten() -> None:
    def mover_threads() -> int:
        names = []
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                names.append((task / "comm").read_text().strip())
        return names.count("pipeline-mover")

    before = mover_threads()
    layer, x = random_layer(24, 31), random_rows(400, 24)
    pipe = open_pipeline(layer)
    pipe.run(x)
    assert mover_threads() == before + 1
    movers = movers_of(pipe)
    pipe.close()
    assert wait_until(lambda: mover_threads() == before), "the system lists a thread for a moment after it was joined"
    movers.close()  # again

    forgotten = open_pipeline(layer)
    forgotten.run(x)
    assert mover_threads() == before + 1
    del forgotten
    gc.collect()
    assert wait_until(lambda: mover_threads() == before)


PROFILED = """
import pipeline.devices.cpu
from helpers.data import random_layer, random_rows
from helpers.native_device import NativeDevice
pipeline.devices.cpu.CpuDevice = NativeDevice
layer, x = random_layer(24, 31), random_rows(200, 24)
with pipeline.Pipeline(layer, devices="cpu", chunk_rows=40, num_streams=3) as pipe:
    stats = pipe.run(x).stats
    in_c = pipe.fleet.stations[0].movers.rings["native"].load.allocated_bytes > 0
print(in_c, *(stats.stages[stage].count for stage in ("fill", "H2D", "D2H", "drain")))
"""


def test_native_mover_makes_ranges_that_profilers_see(tmp_path: Path) -> None:
    library, _ = host_library.find_library()
    if not library.mover_has_ranges() and not IN_CI:
        pytest.skip("the package was built without NVTX's headers")
    assert library.mover_has_ranges()
    tool, log = tmp_path / "tool.so", tmp_path / "log"
    source = NATIVE / "nvtx_tool.c"
    subprocess.run([str(compiler()), "-shared", "-fPIC", "-pthread", "-o", str(tool), str(source)], check=True)
    variables = {"NVTX_INJECTION64_PATH": str(tool), "NVTX_TOOL_LOG": str(log)}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, (source.parents[1], source.parents[2])))
    done = subprocess.run([sys.executable, "-c", PROFILED], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    in_c, *counts = done.stdout.split()
    count = dict(zip(("fill", "H2D", "D2H", "drain"), map(int, counts), strict=True))
    assert in_c == "True"
    events = [line.split() for line in log.read_text().splitlines()]  # what, thread, name, payload, color; id
    copies = [event for event in events if event[0] == "push" and event[2] in ("H2D", "D2H")]
    (mover_thread,) = {thread for _, thread, *_ in copies}
    assert {stage: sum(name == stage for _, _, name, *_ in copies) for stage in ("H2D", "D2H")} == {
        stage: count[stage] for stage in ("H2D", "D2H")
    }
    of_thread = [what for what, thread, *_ in events if thread == mover_thread and what in ("push", "pop")]
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


def test_native_mover_that_profilers_would_not_see_leaves_pieces_to_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = random_layer(24, 31), random_rows(400, 24)
    monkeypatch.setattr("pipeline.staging.native_mover.shows_in_profiles", lambda workers: False)
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(x).out, layer(x))
        assert used(movers_of(pipe)) == BY_C, "nobody profiles"
    monkeypatch.setattr(Ranges, "active", property(lambda self: True, lambda self, value: None), raising=False)
    with open_pipeline(layer) as pipe:
        assert_same_bits(pipe.run(x).out, layer(x))
        assert used(movers_of(pipe)) == BY_PYTHON


def test_native_mover_in_a_trace(tmp_path: Path) -> None:
    layer, x = random_layer(24, 31), random_rows(400, 24)
    for _ in range(5):
        with open_pipeline(layer) as pipe:
            stats = pipe.run(x, trace=tmp_path / "run.json").stats
        timeline, _ = read_trace(tmp_path / "run.json")
        intervals = timeline.devices["cpu"]
        for stage in STAGES:
            own = [each for each in intervals if each.stage == stage]
            assert len(own) == stats.stages[stage].count and {each.chunk for each in own} == set(range(10))
        # A copy ends when the mover's thread sees that it has: on a busy machine that may be after the kernel began.
        if all(stages_follow(intervals, chunk) for chunk in range(10)):
            return
    pytest.fail("the stages of a chunk overlapped in each of five runs")


def stages_follow(intervals: list[Interval], chunk: int) -> bool:
    """Whether each stage of a chunk begins and ends after the one before, its kernel alone, by a millisecond."""
    first, last = (
        {s: f(i for i in intervals if i.stage == s and i.chunk == chunk) for s in STAGES}
        for f in (lambda own: min(i.start_s for i in own), lambda own: max(i.end_s for i in own))
    )
    load = first["fill"] <= first["H2D"] and last["fill"] <= last["H2D"] <= first["kernel"] + 1e-3
    store = first["D2H"] <= first["drain"] and last["D2H"] <= last["drain"]
    return load and last["kernel"] <= first["D2H"] + 1e-3 and store
