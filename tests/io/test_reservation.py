"""Room that is taken for files, at once or ahead of the rows."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, random_rows
from helpers.ends import IN, LAYER, OUT, open_pipeline
from helpers.files import mounted, new_file
from helpers.leaks import PlannedError, nothing_left_behind, pipeline_threads, wait_until

from pipeline import SinkRequest
from pipeline.errors import OutputError
from pipeline.flow import Sink
from pipeline.io import reservation
from pipeline.io.memory import ArraySource
from pipeline.io.reservation import Reservation, is_in_memory
from pipeline.io.sinks import open_sink

X = random_rows(5000, IN)  # whose result takes 25 pages

Fallocate = Callable[[int, int, int], bool]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page each, so that small files take many."""
    monkeypatch.setattr(reservation, "_STEP_BYTES", 4096)


class Gate:
    """Takes room for real, but from its step number `after` on only once it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int = 1) -> None:
        self.real, self.after, self.steps = reservation.fallocate, after, 0
        self.opened, self.reached = threading.Event(), threading.Event()
        monkeypatch.setattr(reservation, "fallocate", self)

    def __call__(self, fd: int, first: int, n_bytes: int) -> bool:
        if self.steps == self.after:
            self.reached.set()
            assert self.opened.wait(30)
        self.steps += 1
        return self.real(fd, first, n_bytes)


def failing_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses the room of one step and of all behind it."""
    real, steps = reservation.fallocate, iter(range(10**9))

    def call(fd: int, first: int, n_bytes: int) -> bool:
        if next(steps) >= step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, first, n_bytes)

    monkeypatch.setattr(reservation, "fallocate", call)


@contextmanager
def reserved(path: Path, first: int, end: int, content: bytes = b"") -> Iterator[tuple[Reservation, int]]:
    with new_file(path, 0) as fd:
        os.pwrite(fd, content, 0)
        room = Reservation(fd, path, first, end)
        try:
            yield room, fd
        finally:
            room.stop()


def new_sink(path: Path) -> Sink:
    return open_sink(path, SinkRequest(ArraySource(X, "NumPy array"), OUT, LAYER.dtype, LAYER.dtype))


# -- one file ----------------------------------------------------------------------------------------------------------


def test_reservation_on_disk_is_there_at_once(tmp_path: Path) -> None:
    with reserved(tmp_path / "y", 0, 3 << 20, b"old") as (room, fd):
        if is_in_memory(fd):
            pytest.skip("temporary files are in memory here")
        room.wait()
        assert os.fstat(fd).st_size == 3 << 20 and os.fstat(fd).st_blocks * 512 >= 3 << 20
        assert os.pread(fd, 5, 0) == b"old\0\0" and pipeline_threads() == []


def test_reservation_in_memory_comes_step_by_step(memory_folder: Path) -> None:
    n_bytes = 100 << 20
    with nothing_left_behind(), reserved(memory_folder / "y", 7, n_bytes, b"old content") as (room, fd):
        room.wait()
        room.wait()
        assert os.fstat(fd).st_size == n_bytes and os.fstat(fd).st_blocks * 512 == n_bytes
        assert os.pread(fd, 12, 0) == b"old content\0"


def test_reservation_of_a_small_file_or_one_without_holes_has_no_thread(memory_folder: Path) -> None:
    full = bytes(20 << 20)
    for first, end, content in [(0, 16 << 20, b""), (0, len(full), full), (5, 5, b""), (0, 100, full)]:
        with reserved(memory_folder / f"{end}", first, end, content) as (room, fd):
            assert pipeline_threads() == []
            room.wait()
            assert os.fstat(fd).st_size == max(end if end > first else 0, len(content))


def test_reservation_is_known_to_be_too_large_before_it_begins(tiny_disk: Path) -> None:
    with new_file(tiny_disk / "y", 0) as fd:
        with pytest.raises(OutputError, match=r"can't reserve 1\.00 GiB for .*y: No space left on device; free space"):
            Reservation(fd, tiny_disk / "y", 0, 1 << 30)
        assert os.fstat(fd).st_size == 0 and os.fstat(fd).st_blocks == 0
        os.pwrite(fd, bytes(40_960), 0)
        Reservation(fd, tiny_disk / "y", 0, 65_536).stop()  # 24,576 are missing, as many are free
        with pytest.raises(OutputError, match="No space left on device"):
            Reservation(fd, tiny_disk / "y", 0, 65_537)


@pytest.mark.usefixtures("small_steps")
def test_reservation_that_fails_late_says_so(memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at(2, monkeypatch)
    with reserved(memory_folder / "y", 0, 40_960) as (room, _):
        for _ in range(2):
            with pytest.raises(
                OutputError, match=r"can't reserve 0\.00 GiB for .*y: No space left on device"
            ) as caught:
                room.wait()
            assert isinstance(caught.value.__cause__, OSError)
        assert wait_until(lambda: pipeline_threads() == [])


@pytest.mark.parametrize("free", [100, 99])
def test_file_system_that_takes_no_room_is_asked_what_is_free(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass over the file, and no fewer bytes in it than before."""
    monkeypatch.setattr(reservation, "fallocate", lambda *_: False)
    monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_blocks=1000, f_bavail=free, f_frsize=4096))
    with new_file(tmp_path / "y", 0) as fd:
        if free < 100:
            with pytest.raises(OutputError, match="No space left on device"):
                Reservation(fd, tmp_path / "y", 0, 409_600)
            return
        Reservation(fd, tmp_path / "y", 0, 409_600).wait()
        assert os.fstat(fd).st_size == 409_600 and os.fstat(fd).st_blocks == 0


def test_run_to_a_file_system_without_limit_or_reservations(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ramfs", "mode=700") as disk, open_pipeline() as pipeline:
        with open(disk / "x", "wb") as file, pytest.raises(OSError, match="not supported"):
            os.pwrite(file.fileno(), b"x", 0)
            assert is_in_memory(file.fileno()) and not reservation.fallocate(file.fileno(), 0, 10)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        pipeline.run(X, disk / "y.npy")
        assert_same_bits(np.load(disk / "y.npy"), LAYER(X))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("kind", ["npy", "map", "map of columns"])
def test_run_waits_for_the_room_of_its_rows(kind: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is written before there is room for all."""
    path = memory_folder / "y.npy"
    out: Any = path
    if kind != "npy":
        order: Any = "F" if kind == "map of columns" else "C"
        out = np.memmap(path, np.float32, "w+", 0, (len(X), OUT), order=order)
    gate, done, held = Gate(monkeypatch, after=5), 0, list[int]()

    def count(progress: Any) -> None:
        nonlocal done
        done = progress.rows_done

    def open_gate() -> None:
        assert gate.reached.wait(30)
        threading.Event().wait(0.05)  # for rows that would not wait
        held.append(done)
        gate.opened.set()

    opener = threading.Thread(target=open_gate)
    with open_pipeline() as pipeline, nothing_left_behind(memory_folder, copy_workers=False):
        opener.start()
        result = pipeline.run(X, out, progress=count)
        opener.join()
    assert held == [0] and done == len(X)
    assert_same_bits(np.load(path) if kind == "npy" else np.ascontiguousarray(result.out), LAYER(X))


@pytest.mark.usefixtures("small_steps")
def test_run_whose_reservation_fails_late_ends_and_leaves_nothing(
    memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_pipeline() as pipeline, nothing_left_behind(memory_folder, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_at(4, patch)
            with pytest.raises(OutputError, match=r"can't reserve .*y\.npy: No space left on device"):
                pipeline.run(X, memory_folder / "y.npy")
        assert list(memory_folder.iterdir()) == []
        pipeline.run(X, memory_folder / "y.npy")
    assert_same_bits(np.load(memory_folder / "y.npy"), LAYER(X))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("error", [PlannedError, KeyboardInterrupt])
def test_run_that_ends_early_ends_the_thread(
    error: type[BaseException], memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is in the middle of a step, and others would follow."""
    gate = Gate(monkeypatch, after=5)

    def refuse(self: Reservation) -> None:
        assert gate.reached.wait(30)
        threading.Timer(0.02, gate.opened.set).start()  # while it is joined
        raise error

    monkeypatch.setattr(Reservation, "wait", refuse)
    with open_pipeline() as pipeline, nothing_left_behind(memory_folder, copy_workers=False):
        with pytest.raises(error):
            pipeline.run(X, memory_folder / "y.npy")
        assert list(memory_folder.iterdir()) == []


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("end", ["abort", "leave", "abort after leave"])
def test_sink_that_ends_early_ends_the_thread(end: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with nothing_left_behind(copy_workers=False):
        sink = new_sink(memory_folder / "y.npy")
        assert gate.reached.wait(30)
        threading.Timer(0.02, gate.opened.set).start()  # while it is joined
        if "leave" in end:
            sink.leave()
        if "abort" in end:
            sink.abort()
        assert pipeline_threads() == [] and gate.steps <= 2
    left = list(memory_folder.iterdir())
    assert left == ([] if end == "abort" else [memory_folder / "y.npy.partial"])
    if left:  # as long as another run expects it to be
        assert left[0].stat().st_size == 128 + 5000 * OUT * 4


@pytest.mark.parametrize("end", ["forks", "exits"])
def test_process_ends_while_room_is_taken(end: str, memory_folder: Path) -> None:
    """A fork has no such thread to end; a process that ends without ending the sink waits for the room, and ends."""
    program = f"""
import os, sys
import numpy as np
from pipeline import SinkRequest
from pipeline.dtypes import FLOAT32
from pipeline.io.memory import ArraySource
from pipeline.io.sinks import open_sink

source = ArraySource(np.empty((1 << 20, 1), np.float32), "NumPy array")
sink = open_sink({str(memory_folder / "y.npy")!r}, SinkRequest(source, 64, FLOAT32, FLOAT32))
if {end == "forks"}:
    child = os.fork()
    if not child:
        sink.leave()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    sink.abort()
    assert not os.listdir({str(memory_folder)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
