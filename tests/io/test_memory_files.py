"""Files in file systems in memory: what copy workers in C write through maps, and what they do where that can't be."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, random_rows
from helpers.ends import IN, LAYER, OUT, open_pipeline
from helpers.files import new_file
from helpers.leaks import nothing_left_behind, small_rings

from pipeline.arrays import HostArray
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Cast
from pipeline.errors import OutputError
from pipeline.io.files import FileLayout, FileRows
from pipeline.io.reservation import is_in_memory
from pipeline.rows import Drain
from pipeline.staging.native import NativeWorkers

CASTS = [None, Cast(FLOAT32, FLOAT16), Cast(FLOAT32, BFLOAT16), Cast(FLOAT16, FLOAT32), Cast(BFLOAT16, FLOAT32)]


@pytest.fixture
def workers() -> Iterator[NativeWorkers]:
    """As many as write through maps."""
    opened = NativeWorkers(4)
    yield opened
    opened.close()


def random_piece(cast: Cast | None, rows: int, features: int) -> HostArray:
    piece = random_rows(rows, features)
    if cast is not None and cast.source is not FLOAT32:
        piece = piece.astype(np.float16)
    return piece if cast is None else piece.view(cast.source.carrier)


@pytest.mark.parametrize("position", [0, 128, 77])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (400, 5), (30, 1031), (3, 300_000)])
@pytest.mark.parametrize("cast", CASTS)
def test_map_and_pwrite_give_the_same_bytes(
    cast: Cast | None, rows: int, features: int, position: int, memory_folder: Path, workers: NativeWorkers
) -> None:
    """The map's descriptor is one that can't be written: only the map is left."""
    piece = random_piece(cast, rows, features)
    itemsize = 4 if cast is None else cast.target.itemsize
    end = position + (rows + 2) * features * itemsize
    contents = []
    for name in ("map", "pwrite"):
        path = memory_folder / name
        with new_file(path, end) as fd, open(path, "rb") as readable:
            layout = FileLayout.in_order(fd, path, position, features, itemsize, reads=False)
            if name == "map":
                layout = replace(layout.mapped(end), fd=readable.fileno())
                workers.run(Drain(FileRows(layout, 1, cast), 0, piece))
            else:
                FileRows(layout, 1, cast).write(0, piece)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] and any(contents[0])


def test_files_on_disk_and_few_workers_use_no_map(tmp_path: Path, memory_folder: Path) -> None:
    few = NativeWorkers(1)
    piece = random_rows(10, 3)
    with new_file(memory_folder / "y", 120) as fd, open(memory_folder / "y", "rb") as readable:
        layout = FileLayout.in_order(fd, memory_folder / "y", 0, 3, 4, reads=False).mapped(120)
        with pytest.raises(OutputError, match="Bad file descriptor"):
            few.run(Drain(FileRows(replace(layout, fd=readable.fileno()), 0, None), 0, piece))
    few.close()
    with new_file(tmp_path / "y", 120) as fd:
        layout = FileLayout.in_order(fd, tmp_path / "y", 0, 3, 4, reads=False)
        assert (layout.mapped(120).map is None) != is_in_memory(fd)


def test_system_that_forbids_stores_through_maps_leaves_pwrite(
    memory_folder: Path, workers: NativeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.staging.native._can_use_maps", lambda: False)
    piece, path = random_rows(10, 3), memory_folder / "y"
    with new_file(path, 120) as fd, open(path, "rb") as readable:
        layout = FileLayout.in_order(fd, path, 0, 3, 4, reads=False).mapped(120)
        with pytest.raises(OutputError, match="Bad file descriptor"):
            workers.run(Drain(FileRows(replace(layout, fd=readable.fileno()), 0, None), 0, piece))
        workers.run(Drain(FileRows(layout, 0, None), 0, piece))
    assert path.read_bytes() == piece.tobytes()


@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["npy", "map"])
def test_run_to_a_file_in_memory(
    kind: str, out_dtype: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rings(monkeypatch, 1000, 3, workers=4)
    x, path = random_rows(3001, IN), memory_folder / "y.npy"
    with open_pipeline(out_dtype=out_dtype) as pipeline:
        expected = pipeline.run(x).out
        with nothing_left_behind(memory_folder, copy_workers=False):
            out: Any = path
            if kind == "map":
                out = np.lib.format.open_memmap(path, "w+", out_dtype, (len(x), OUT))
            pipeline.run(x, out)
            del out
    assert_same_bits(np.load(path), expected)


def test_map_leaves_no_pages_in_the_process(memory_folder: Path, workers: NativeWorkers) -> None:
    piece = np.ones((64, 1 << 16), np.float32)  # 16 MiB
    n_bytes = 4 * piece.nbytes
    with new_file(memory_folder / "y", n_bytes) as fd:
        layout = FileLayout.in_order(fd, memory_folder / "y", 0, 1 << 16, 4, reads=False).mapped(n_bytes)
        assert layout.map is not None
        before = shared_bytes()
        for i in range(4):
            workers.run(Drain(FileRows(layout, 64 * i, None), 0, piece))
        assert shared_bytes() - before < 1 << 20
        assert os.fstat(fd).st_blocks * 512 == n_bytes


def shared_bytes() -> int:
    """What this process has mapped of files in memory."""
    found = re.search(r"RssShmem:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


# -- what can't be written ---------------------------------------------------------------------------------------------


def test_file_cut_before_a_write_through_its_map_is_an_error(memory_folder: Path, workers: NativeWorkers) -> None:
    piece, path = random_rows(1000, 64), memory_folder / "y"
    with new_file(path, piece.nbytes) as fd:
        layout = FileLayout.in_order(fd, path, 0, 64, 4, reads=False).mapped(piece.nbytes)
        os.truncate(fd, 10_000)
        with pytest.raises(OutputError, match=rf"{path} failed: somebody cut the file .*10000 bytes .* least 256000"):
            workers.run(Drain(FileRows(layout, 0, None), 0, piece))


def test_full_file_system_under_a_map_is_an_error(tiny_disk: Path, workers: NativeWorkers) -> None:
    """Without a reservation: the file has a hole where there is no room for a page."""
    piece, path = random_rows(1000, 64), tiny_disk / "y"
    with new_file(path, piece.nbytes) as fd:
        layout = FileLayout.in_order(fd, path, 0, 64, 4, reads=False).mapped(piece.nbytes)
        with pytest.raises(OutputError, match=r"y failed: No space left on device; free space"):
            workers.run(Drain(FileRows(layout, 0, None), 0, piece))


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("at", ["early", "end"])
@pytest.mark.parametrize("kind", ["npy", "map"])
def test_file_cut_during_a_run_is_never_called_complete(
    kind: str, at: str, native: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pwrite` makes a file that was cut long enough again: the rows before are lost all the same."""
    small_rings(monkeypatch, 1000, 3, workers=4)
    monkeypatch.setenv("PIPELINE_NATIVE_COPY", native)
    x, path = random_rows(5000, IN), memory_folder / "y.npy"
    out: Any = path
    if kind == "map":
        out = np.memmap(path, np.float32, "w+", 0, (len(x), OUT))
    cut = 0

    def cut_once(progress: Any) -> None:
        nonlocal cut
        if not cut and progress.rows_done >= (2500 if at == "early" else len(x)):
            os.truncate(path if kind == "map" else f"{path}.partial", 3)
            cut = progress.rows_done

    with open_pipeline() as pipeline, nothing_left_behind(memory_folder, copy_workers=False):
        with pytest.raises(OutputError, match="somebody cut the file while it was written"):
            pipeline.run(x, out, progress=cut_once)
        assert cut and path.exists() == (kind == "map")
        pipeline.run(x, memory_folder / "again.npy")
    assert_same_bits(np.load(memory_folder / "again.npy"), LAYER(x))


def test_file_on_disk_cut_at_the_end_is_never_called_complete(tmp_path: Path) -> None:
    x, path = random_rows(50, IN), tmp_path / "y.npy"

    def cut(progress: Any) -> None:
        if progress.rows_done == len(x):
            os.truncate(f"{path}.partial", 500)

    with open_pipeline() as pipeline, pytest.raises(OutputError, match="somebody cut the file while it was written"):
        pipeline.run(x, path, progress=cut)
    assert list(tmp_path.iterdir()) == []


def test_failed_run_gives_its_room_back_while_its_error_is_kept(tiny_disk: Path, monkeypatch: Any) -> None:
    """A traceback names frames that hold the map, and a mapped file's pages stay."""
    small_rings(monkeypatch, 1000, 3, workers=4)
    x = random_rows(2500, IN)  # 50,000 bytes of 64 KiB

    def refuse(progress: Any) -> None:
        raise OSError(errno.EIO, "planned")

    with open_pipeline() as pipeline:
        with pytest.raises(OSError, match="planned") as kept:
            pipeline.run(x, tiny_disk / "y.npy", progress=refuse)
        pipeline.run(x, tiny_disk / "y.npy")
    assert kept.value.__traceback__ is not None
    assert_same_bits(np.load(tiny_disk / "y.npy"), LAYER(x))
